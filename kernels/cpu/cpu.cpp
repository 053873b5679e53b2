// attend and append of a site's state on a CPU: what reference.py specifies, in the formats of packing.py and state.py.
//
// A plain C interface without PyTorch's headers, so that it compiles in seconds; library.py does that.
//
// A task is some queries of one row and head of keys and values, and a stretch of the tokens they attend to. It works
// off 32 tokens at a time, which stay in the first-level cache: scores, a running softmax, weighted values. The
// stretches of the same queries are joined by whichever task ends last, always in the same order, and how they are cut
// depends neither on the number of threads nor on the other rows.

#include <atomic>
#include <memory>

#include "pack.h"
#include "task.h"

namespace {

// The queries of a task. Where they have several stretches, these leave what is to be joined from the place `partial`
// on; so many are done.
struct Item {
    int64_t row, head, first_query, partial;
    std::atomic<int64_t> done;
};

// A call: all its tasks, which threads take one after the other.
template <class Element>
struct Job {
    const AttendArguments& arguments;
    std::unique_ptr<Item[]> items;
    int64_t item_count = 0, most_stretches = 1, value_stride, queries;
    std::unique_ptr<float[]> partial;
    std::atomic<int64_t> next{0};

    explicit Job(const AttendArguments& arguments)
        : arguments(arguments), value_stride(round_up(arguments.value.dim, LANES)) {
        const Shape& shape = arguments.shape;
        queries = shape.tokens * arguments.shared < TASK_QUERIES ? shape.tokens * arguments.shared : TASK_QUERIES;
        int64_t tiles = (shape.tokens * arguments.shared + TASK_QUERIES - 1) / TASK_QUERIES;
        items.reset(new Item[shape.rows * shape.heads * tiles]);
        int64_t partials = 0;
        Scratch none;
        for (int64_t row = 0; row < shape.rows; row++) {
            for (int64_t tile = 0; tile < tiles; tile++) {
                Task<Element> task(arguments, none, row, 0, tile * TASK_QUERIES);
                if (task.is_empty()) break;
                int64_t stretches = task.stretches();
                if (stretches > most_stretches) most_stretches = stretches;
                for (int64_t head = 0; head < shape.heads; head++) {
                    Item& item = items[item_count++];
                    item.row = row, item.head = head, item.first_query = tile * TASK_QUERIES;
                    item.partial = partials;
                    item.done.store(0, std::memory_order_relaxed);
                    if (stretches > 1) partials += stretches;
                }
            }
        }
        if (partials) partial.reset(new float[partials * queries * (value_stride + 2)]);
    }

    float* partial_of(const Item& item, int64_t stretch) const {
        return partial.get() + (item.partial + stretch) * queries * (value_stride + 2);
    }

    static void work(void* job) {
        static thread_local Scratch scratch;
        Job& self = *static_cast<Job*>(job);
        scratch.reserve(self.arguments);
        int64_t tasks = self.item_count * self.most_stretches;
        for (int64_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            self.run(self.items[i / self.most_stretches], i % self.most_stretches, scratch);
    }

    void run(Item& item, int64_t stretch, Scratch& scratch) {
        Task<Element> task(arguments, scratch, item.row, item.head, item.first_query);
        int64_t stretches = task.stretches(), count = task.count(), dim = arguments.value.dim;
        if (stretch >= stretches) return;
        task.attend(stretch);
        if (stretches == 1) {
            for (int64_t query = 0; query < count; query++) {
                float scale = 1 / sum(load_floats(scratch.sums + query * LANES)), *output = task.output(query);
                const float* attended = scratch.attended + query * value_stride;
                for (int64_t channel = 0; channel < dim; channel++) output[channel] = attended[channel] * scale;
            }
            return;
        }
        float* mine = partial_of(item, stretch);
        memcpy(mine, scratch.attended, count * value_stride * sizeof(float));
        for (int64_t query = 0; query < count; query++) {
            mine[queries * value_stride + 2 * query] = scratch.highest[query];
            mine[queries * value_stride + 2 * query + 1] = sum(load_floats(scratch.sums + query * LANES));
        }
        if (item.done.fetch_add(1, std::memory_order_acq_rel) == stretches - 1)
            for (int64_t query = 0; query < count; query++) join(item, stretches, query, task.output(query));
    }

    void join(const Item& item, int64_t stretches, int64_t query, float* output) const {
        int64_t dim = arguments.value.dim;
        float highest = -INFINITY, total = 0;
        for (int64_t i = 0; i < stretches; i++) {
            float its_highest = partial_of(item, i)[queries * value_stride + 2 * query];
            highest = its_highest > highest ? its_highest : highest;
        }
        memset(output, 0, dim * sizeof(float));
        for (int64_t i = 0; i < stretches; i++) {
            const float *its = partial_of(item, i), *statistics = its + queries * value_stride + 2 * query;
            if (statistics[0] == -INFINITY) continue;
            float weight = std::exp2(statistics[0] - highest);
            total += weight * statistics[1];
            const float* attended = its + query * value_stride;
            for (int64_t channel = 0; channel < dim; channel++) output[channel] += weight * attended[channel];
        }
        for (int64_t channel = 0; channel < dim; channel++) output[channel] /= total;
    }
};

void run(const Threads& threads, int64_t tasks, void (*work)(void*), void* job) {
    int64_t count = tasks < threads.count ? tasks : threads.count;
    if (count > 1 && threads.parallel)
        threads.parallel(work, job, count, 0);
    else
        work(job);
}

template <class Element>
void attend(const AttendArguments& arguments, const Threads& threads) {
    const Shape& shape = arguments.shape;
    int64_t query_heads = shape.heads * arguments.shared, dim = arguments.value.dim;
    for (int64_t row = 0; row < shape.rows; row++)
        for (int64_t head = 0; head < query_heads && shape.starts[row]; head++)
            memset(arguments.output + (row * query_heads + head) * shape.tokens * dim, 0,
                   shape.starts[row] * dim * sizeof(float));
    Job<Element> job(arguments);
    run(threads, job.item_count * job.most_stretches, Job<Element>::work, &job);
}

// The blocks that a call of append completes. Each is a task, which threads take one after the other.
template <class Element>
struct Blocks {
    const Shape& shape;
    const Side &key, &value;
    const BlockFormat &key_format, &value_format;
    int64_t most = 0;  // of a row
    std::atomic<int64_t> next{0};

    Blocks(const Shape& shape, const Side& key, const Side& value, const BlockFormat& key_format,
           const BlockFormat& value_format)
        : shape(shape), key(key), value(value), key_format(key_format), value_format(value_format) {
        for (int64_t row = 0; row < shape.rows; row++) {
            int64_t count = end_block(row) - first_block(row);
            if (count > most) most = count;
        }
    }

    int64_t end_block(int64_t row) const { return packed_blocks(shape, Row(shape, row).end); }
    // Of more blocks than there is room for, the first ones are seen by nothing that follows.
    int64_t first_block(int64_t row) const {
        int64_t first = Row(shape, row).blocks, kept = end_block(row) - shape.capacity;
        return first > kept ? first : kept;
    }
    int64_t tasks() const { return shape.rows * shape.heads * most * 2; }

    static void work(void* blocks) {
        static thread_local PackScratch scratch;
        Blocks& self = *static_cast<Blocks*>(blocks);
        for (int64_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < self.tasks();) {
            int64_t pair = i / 2 / self.most;
            self.pack(pair / self.shape.heads, pair % self.shape.heads, i / 2 % self.most, i % 2, scratch);
        }
    }

    void pack(int64_t row_index, int64_t head, int64_t number, bool is_value, PackScratch& scratch) const {
        int64_t block = first_block(row_index) + number;
        if (block >= end_block(row_index)) return;
        Row row(shape, row_index);
        if (row.packed_pages && !row.packed_pages.has(block)) return;
        BlockWriter<Element> writer{shape, {shape, row, row_index, head}, scratch};
        writer.write(is_value ? value : key, is_value ? value_format : key_format, !is_value, block);
    }
};

template <class Element>
void pack(const Shape& shape, const Side& key, const Side& value, const BlockFormat& key_format,
          const BlockFormat& value_format, const Threads& threads) {
    Blocks<Element> blocks(shape, key, value, key_format, value_format);
    if (blocks.most > 0) run(threads, blocks.tasks(), Blocks<Element>::work, &blocks);
}

// What of a chunk belongs into the sink and the ring, or into raw pages.
template <class Element>
void copy_tokens(const Shape& shape, const Side& side) {
    for (int64_t row_index = 0; row_index < shape.rows; row_index++) {
        Row row(shape, row_index);
        int64_t oldest = row.end - shape.slots > shape.sinks ? row.end - shape.slots : shape.sinks;
        for (int64_t token = row.length; token < row.end; token++) {
            if (token >= shape.sinks && token < oldest) token = oldest;
            if (row.raw_pages && !row.raw_pages.has(token)) continue;
            for (int64_t head = 0; head < shape.heads; head++) {
                Reader<Element> reader{shape, row, row_index, head};
                memcpy(reader.stored(side, token), reader.element(side, token), side.dim * sizeof(Element));
            }
        }
    }
}

// Calls use with an element of the type that keys and values have.
template <class Use>
void with_element(const Shape& shape, Use use) {
    switch (shape.element) {
        case FLOAT32: return use(float());
        case BFLOAT16: return use(Bfloat16());
        case FLOAT16: return use(Float16());
    }
}

// Whether whatever is read of pages is in one.
bool is_readable(const AttendArguments& arguments) {
    Scratch none;
    for (int64_t row = 0; row < arguments.shape.rows && arguments.shape.raw.size; row++) {
        Task<float> task(arguments, none, row, 0, 0);
        if (!task.is_empty() && !Row(arguments.shape, row).is_readable(arguments.shape, task.earliest(0))) return false;
    }
    return true;
}

bool is_packable(const Shape& shape) {
    for (int64_t row = 0; row < shape.rows && shape.raw.size; row++)
        if (!Row(shape, row).is_packable(shape)) return false;
    return true;
}

}  // namespace

// Both say whether it was done: not, and nothing is written, where something that is read lies in no page.

extern "C" bool kvmix_attend(const Shape* shape, const Side* key, const Side* value, const BlockFormat* key_format,
                             const BlockFormat* value_format, const Attention* attention, const Threads* threads) {
    AttendArguments arguments{*attention, *shape, *key, *value, *key_format, *value_format};
    if (!is_readable(arguments)) return false;
    with_element(*shape, [&](auto element) { attend<decltype(element)>(arguments, *threads); });
    return true;
}

extern "C" bool kvmix_append(const Shape* shape, const Side* key, const Side* value, const BlockFormat* key_format,
                             const BlockFormat* value_format, const Threads* threads) {
    if (!is_packable(*shape)) return false;
    with_element(*shape, [&](auto element) {
        pack<decltype(element)>(*shape, *key, *value, *key_format, *value_format, *threads);
        // Only now may the ring be overwritten: the tokens just packed lay in it.
        copy_tokens<decltype(element)>(*shape, *key);
        copy_tokens<decltype(element)>(*shape, *value);
    });
    return true;
}

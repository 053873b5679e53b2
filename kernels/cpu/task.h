// The attention of some queries to a stretch of the tokens before them.

#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "products.h"
#include "state.h"

namespace {

// Up to so many queries it is cheaper to fold scales and zero points into them than to dequantize a block.
constexpr int FOLDED_QUERIES = 8;
constexpr int TASK_QUERIES = 128;
constexpr double LOG2_E = 1.4426950408889634;
// Tokens of a stretch, in tiles of 32, for each FOLDED_QUERIES queries: few enough that a short context still fills
// some threads, and enough that results to be joined are a small part of what was read.
constexpr int64_t STRETCH_TILES = 8;

// Where everything that a thread needs for 32 tokens lies.
struct Scratch {
    float *keys, *values, *rows;         // [query dim][32], [32][value stride], [32][key stride]
    float *scales, *zero_points;         // one for each group
    float *q, *folded, *offsets;         // [queries][query stride]; for each group [queries][folded stride], [queries]
    float *weights, *folded_weights;     // [queries][32]
    float *attended, *zero_sums, *sums;  // [queries][value stride], [queries][groups][LANES], [queries][LANES]
    float *highest, *correction;         // [queries]
    uint8_t *codes, *high, *turned;      // what packing.h asks for

    void reserve(const AttendArguments& arguments) {
        const Side &key = arguments.key, &value = arguments.value;
        int64_t key_stride = round_up(key.dim, LANES), value_stride = round_up(value.dim, LANES);
        int64_t query_stride = round_up(arguments.scored_values() + key.dim, LANES);
        int64_t widest = key_stride > value_stride ? key_stride : value_stride;
        int64_t groups = BLOCK * widest + LANES;
        int64_t folded_count = BLOCK / LANES * FOLDED_QUERIES;
        struct {
            float** place;
            int64_t count;
        } parts[] = {
            {&keys, BLOCK * (query_stride + LANES)},
            {&values, BLOCK * value_stride},
            {&rows, BLOCK * key_stride},
            {&scales, groups},
            {&zero_points, groups},
            {&q, TASK_QUERIES * query_stride},
            {&folded, folded_count * (key_stride + LANES)},
            {&offsets, folded_count},
            {&weights, TASK_QUERIES * BLOCK},
            {&folded_weights, FOLDED_QUERIES * BLOCK},
            {&attended, TASK_QUERIES * value_stride},
            {&zero_sums, FOLDED_QUERIES * value_stride},
            {&sums, TASK_QUERIES * LANES},
            {&highest, TASK_QUERIES},
            {&correction, TASK_QUERIES},
        };
        size_t total = 0;
        for (auto& part : parts) total += round_up(part.count, LANES);
        floats.resize(total + LANES);
        float* next = floats.data();
        next += (LANES - reinterpret_cast<uintptr_t>(next) / sizeof(float) % LANES) % LANES;
        for (auto& part : parts) {
            *part.place = next;
            next += round_up(part.count, LANES);
        }
        int64_t count = BLOCK * (widest + BYTES_BEYOND);
        bytes.resize(6 * count);  // in turned, metadata of 4 bytes for each element at most
        codes = bytes.data(), high = codes + count, turned = high + count;
    }

  private:
    std::vector<float> floats;
    std::vector<uint8_t> bytes;
};

template <class Element, class Kept>
class Task {
    const AttendArguments& arguments;
    const Side &key, &value;
    const BlockFormat &key_format, &value_format;
    Scratch& scratch;
    Row row;
    Reader<Element, Kept> reader;
    int64_t row_index, head, first_query, queries, key_stride, value_stride;
    int64_t scored_values, query_dim, query_stride;  // values that are keys too come before these
    int64_t folded_stride;  // room behind the channels for the end of a vector that begins anywhere
    static constexpr float NOTHING[TASK_QUERIES] = {};

  public:
    Task(const AttendArguments& arguments, Scratch& scratch, int64_t row_index, int64_t head, int64_t first_query)
        : arguments(arguments), key(arguments.key), value(arguments.value), key_format(arguments.key_format),
          value_format(arguments.value_format), scratch(scratch),
          row(arguments.shape, row_index), reader{arguments.shape, row, row_index, head}, row_index(row_index),
          head(head),
          first_query(first_query), key_stride(round_up(key.dim, LANES)), value_stride(round_up(value.dim, LANES)),
          scored_values(arguments.scored_values()), query_dim(scored_values + key.dim),
          query_stride(round_up(query_dim, LANES)), folded_stride(key_stride + LANES) {
        int64_t left = (arguments.shape.tokens - row.start) * arguments.shared - first_query;
        queries = left < TASK_QUERIES ? left : TASK_QUERIES;
        reader.seen = earliest(0);
    }

    bool is_empty() const { return queries <= 0; }

    // Queries are numbered token by token, so that neighbours attend to nearly the same tokens.
    int64_t token_of(int64_t query) const { return row.length + (first_query + query) / arguments.shared; }
    int64_t earliest(int64_t query) const {
        if (arguments.attention_chunk) return token_of(query) - token_of(query) % arguments.attention_chunk;
        int64_t first = arguments.sliding_window ? token_of(query) - arguments.sliding_window + 1 : 0;
        return first > 0 ? first : 0;
    }
    int64_t first_tile() const { return row.tile_of(earliest(0)); }
    int64_t query_head(int64_t query) const {
        return head * arguments.shared + (first_query + query) % arguments.shared;
    }
    int64_t end_tile() const { return row.tile_of(token_of(queries - 1)) + 1; }
    int64_t stretch_tiles() const { return STRETCH_TILES * ((queries + FOLDED_QUERIES - 1) / FOLDED_QUERIES); }
    int64_t stretches() const { return (end_tile() - first_tile() + stretch_tiles() - 1) / stretch_tiles(); }

    // Leaves in scratch the sums of weighted values, of weights, and the highest score, in powers of two.
    void attend(int64_t stretch) {
        begin(stretch == 0);
        int64_t first = first_tile() + stretch * stretch_tiles(), end = first + stretch_tiles();
        if (end > end_tile()) end = end_tile();
        for (int64_t tile = first; tile < end; tile++) {
            if (int64_t next = row.block(tile + 1); row.packed_pages && tile + 1 < end && next >= 0) {
                reader.prefetch(key, key_format, next);
                reader.prefetch(value, value_format, next);
            }
            score_tile(tile);
            for (int64_t query = 0; query < queries; query++) softmax(tile, query);
            weigh_tile(tile);
        }
        finish();
    }

    int64_t count() const { return queries; }

    float* output(int64_t query) const {
        int64_t token = row.start + (first_query + query) / arguments.shared;
        int64_t query_heads = arguments.shape.heads * arguments.shared;
        return arguments.output +
               ((row_index * query_heads + query_head(query)) * arguments.shape.tokens + token) * value.dim;
    }

  private:
    // Queries in float32, scaled so that powers of two take the place of exponentials. with_sinks: whether the weights
    // that have no value are among this stretch's.
    void begin(bool with_sinks) {
        float factor = arguments.scale * (arguments.softcap ? 1 / arguments.softcap : 1) * LOG2_E;
        for (int64_t query = 0; query < queries; query++) {
            int64_t token = row.start + (first_query + query) / arguments.shared;
            const Element* from = static_cast<const Element*>(arguments.query) + row_index * arguments.row_stride +
                                  query_head(query) * arguments.head_stride + token * arguments.token_stride;
            float* to = scratch.q + query * query_stride;
            for (int64_t channel = 0; channel < query_dim; channel += LANES)
                store(to + channel, load_first(from + channel, query_dim - channel) * factor);
            scratch.highest[query] = -INFINITY;
        }
        memset(scratch.sums, 0, queries * LANES * sizeof(float));
        for (int64_t query = 0; query < queries && with_sinks && arguments.sink_logits; query++) {
            scratch.highest[query] = arguments.sink_logits[query_head(query)] * float(LOG2_E);
            scratch.sums[query * LANES] = 1;
        }
        memset(scratch.attended, 0, queries * value_stride * sizeof(float));
        if (is_folded(value_format)) memset(scratch.zero_sums, 0, queries * value_stride * sizeof(float));
    }

    bool is_folded(const BlockFormat& format) const {
        return format.bits < 16 && queries <= FOLDED_QUERIES && format.group % LANES == 0 && !scored_values;
    }

    void score_tile(int64_t tile) {
        int64_t block = row.block(tile);
        if (scored_values) {
            read_values(tile);
            turn_rows(scratch.values, value_stride, scratch.keys);
        }
        if (block < 0 || key_format.bits == 16)
            read_keys(tile);
        else
            unpack_block(reader.block(key, key_format, block));
        if (block < 0 || !is_folded(key_format)) {
            score_queries(scratch.keys, query_dim, scratch.q, query_stride, queries, BLOCK, NOTHING, scratch.weights);
            return;
        }
        for (int64_t group = 0, token = 0; token < BLOCK; group++, token += key_format.group)
            score_queries(scratch.codes + token, key.dim, scratch.folded + group * FOLDED_QUERIES * folded_stride,
                          folded_stride, queries, key_format.group, scratch.offsets + group * FOLDED_QUERIES,
                          scratch.weights + token);
    }

    void read_keys(int64_t tile) {
        reader.rows(key, key_format, tile, scratch.rows, key_stride);
        turn_rows(scratch.rows, key_stride, scratch.keys + scored_values * BLOCK);
    }

    // [32][stride] to [stride][32].
    static void turn_rows(const float* rows, int64_t stride, float* to) {
        for (int token = 0; token < BLOCK; token += LANES)
            for (int64_t channel = 0; channel < stride; channel += LANES)
                transpose<Floats, LANES>(rows + token * stride + channel, stride, to + channel * BLOCK + token, BLOCK);
    }

    void unpack_block(const uint8_t* packed) {
        int64_t groups = BLOCK / key_format.group, first = 0;
        const Part* end = key_format.parts + key_format.part_count;
        for (const Part* part = key_format.parts; part < end; first += part->channels, part++) {
            int64_t bits = part->bits, dim = part->channels;
            unpack_keys(packed, bits, dim, scratch.codes + first * BLOCK, scratch.high, scratch.turned);
            packed += code_bytes(dim, bits);
            packed += read_metadata(packed, groups * dim, key_format.scale_bits, scratch.scales, scratch.zero_points);
            for (int64_t group = 0; group < groups; group++) {
                const float *scales = scratch.scales + group * dim, *zero_points = scratch.zero_points + group * dim;
                if (is_folded(key_format))
                    fold(scales, zero_points, group, first, dim);
                else
                    dequantize_keys(scales, zero_points, group, first, dim);
            }
        }
    }

    void dequantize_keys(const float* scales, const float* zero_points, int64_t group, int64_t first, int64_t dim) {
        for (int64_t channel = 0; channel < dim; channel++) {
            int64_t place = (first + channel) * BLOCK + group * key_format.group;
            dequantize(scratch.codes + place, key_format.group, scales[channel], zero_points[channel],
                       scratch.keys + scored_values * BLOCK + place);
        }
    }

    // q . (code * scale + zero point) = (q * scale) . code + q . zero point, for a group of tokens.
    void fold(const float* scales, const float* zero_points, int64_t group, int64_t first, int64_t dim) {
        for (int64_t query = 0; query < queries; query++) {
            const float* q = scratch.q + query * query_stride + first;
            float* folded = scratch.folded + (group * FOLDED_QUERIES + query) * folded_stride + first;
            float* total = scratch.offsets + group * FOLDED_QUERIES + query;
            Floats offset = {};
            for (int64_t channel = 0; channel < dim; channel += LANES) {
                Floats its_q = load_first(q + channel, dim - channel);
                store(folded + channel, its_q * load_floats(scales + channel));
                offset += its_q * load_floats(zero_points + channel);
            }
            *total = (first ? *total : 0) + sum(offset);
        }
    }

    // Scores become weights, 2 ** (score - highest so far).
    void softmax(int64_t tile, int64_t query) {
        constexpr int VECTORS = BLOCK / LANES;
        float* place = scratch.weights + query * BLOCK;
        Floats scores[VECTORS];
        for (int part = 0; part < VECTORS; part++) scores[part] = load_floats(place + part * LANES);
        if (arguments.softcap) cap(scores);
        int64_t first = row.first(tile), last = row.last(tile);
        if (arguments.slopes) slope(scores, query, first);
        int64_t begin = earliest(query) - first, end = (token_of(query) < last ? token_of(query) + 1 : last) - first;
        if (begin >= BLOCK || end <= 0) {  // nothing here is attended to
            memset(place, 0, BLOCK * sizeof(float));
            scratch.correction[query] = 1;
            return;
        }
        if (begin > 0 || end < BLOCK) mask(scores, begin, end);
        Floats top = scores[0];
        for (int part = 1; part < VECTORS; part++) top = largest(top, scores[part]);
        float before = scratch.highest[query], highest = largest(top);
        highest = highest > before ? highest : before;
        Floats total = {};
        for (int part = 0; part < VECTORS; part++) {
            Floats weight = exp2(scores[part] - highest);
            weight = scores[part] == -INFINITY ? Floats{} : weight;
            total += weight;
            store(place + part * LANES, weight);
        }
        float correction = highest == before ? 1 : std::exp2(before - highest);
        float* sums = scratch.sums + query * LANES;
        store(sums, load_floats(sums) * correction + total);
        scratch.highest[query] = highest;
        scratch.correction[query] = correction;
    }

    static Ints lanes() {
        Ints lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        return lane;
    }

    // The distances from the query to 32 tokens from the first on, times its head's slope, are added to its scores.
    template <int VECTORS>
    void slope(Floats (&scores)[VECTORS], int64_t query, int64_t first) const {
        float slope = arguments.slopes[query_head(query)] * float(LOG2_E);
        Ints distance = lanes() + int32_t(first - token_of(query));
        for (Floats& score : scores) {
            score += slope * __builtin_convertvector(distance, Floats);
            distance += LANES;
        }
    }

    // No score but those of tokens begin to end - 1.
    template <int VECTORS>
    static void mask(Floats (&scores)[VECTORS], int32_t begin, int32_t end) {
        Ints lane = lanes();
        for (int part = 0; part < VECTORS; part++, lane += LANES)
            scores[part] = ((lane >= begin) & (lane < end)) ? scores[part] : broadcast(-INFINITY);
    }

    // softcap * tanh(x) * log2(e), where the scores are x * log2(e).
    template <int VECTORS>
    void cap(Floats (&scores)[VECTORS]) const {
        float limit = float(arguments.softcap) * float(LOG2_E);
        // Beyond 30 tanh is 1 in float32.
        for (Floats& score : scores) score = limit - 2 * limit / (exp2(2 * clamp(score, 30)) + 1);
    }

    // Values of a tile in float32.
    void read_values(int64_t tile) {
        int64_t block = row.block(tile);
        if (block < 0 || value_format.bits == 16)
            reader.rows(value, value_format, tile, scratch.values, value_stride);
        else
            dequantize_values(unpack_values_of(block));
    }

    // Their codes, scales and zero points.
    ValueLayout unpack_values_of(int64_t block) {
        const uint8_t* packed = reader.block(value, value_format, block);
        ValueLayout layout =
            unpack_values(packed, value_format.bits, value.dim, scratch.codes, scratch.high, scratch.turned);
        read_turned_metadata(packed + code_bytes(value.dim, value_format.bits), value.dim / value_format.group,
                             value_format.scale_bits, scratch.turned, scratch.scales, scratch.zero_points);
        return layout;
    }

    void weigh_tile(int64_t tile) {
        bool folded = is_folded(value_format);
        if (folded && row.block(tile) >= 0) {
            weigh_folded(value.dim / value_format.group, unpack_values_of(row.block(tile)));
            return;
        }
        if (!scored_values) read_values(tile);
        if (folded) rescale_zero_sums();
        weigh_queries(scratch.values, ValueLayout{value_stride, value_stride, 0}, 0, value_stride, scratch.weights,
                      queries, scratch.correction, scratch.attended, value_stride);
    }

    void dequantize_values(const ValueLayout& layout) {
        int64_t step = std::gcd(value_format.group, layout.slice);
        for (int64_t channel = 0; channel < value.dim; channel += step) {
            const float* scales = scratch.scales + channel / value_format.group * BLOCK;
            const float* zero_points = scratch.zero_points + channel / value_format.group * BLOCK;
            const uint8_t* codes = scratch.codes + layout.place(channel);
            for (int token = 0; token < BLOCK; token++)
                dequantize(codes + token * layout.token_stride, step, scales[token], zero_points[token],
                           scratch.values + token * value_stride + channel);
        }
    }

    void rescale_zero_sums() {
        int64_t count = value.dim / value_format.group * LANES;
        for (int64_t query = 0; query < queries; query++) {
            float *sums = scratch.zero_sums + query * count, correction = scratch.correction[query];
            for (int64_t i = 0; i < count; i += LANES) store(sums + i, load_floats(sums + i) * correction);
        }
    }

    // weight * (code * scale + zero point) = (weight * scale) * code + weight * zero point
    void weigh_folded(int64_t groups, const ValueLayout& layout) {
        for (int64_t group = 0; group < groups; group++) {
            const float *scales = scratch.scales + group * BLOCK, *zero_points = scratch.zero_points + group * BLOCK;
            for (int64_t query = 0; query < queries; query++) {
                float* place = scratch.zero_sums + (query * groups + group) * LANES;
                Floats zero_sum = load_floats(place) * scratch.correction[query];
                for (int token = 0; token < BLOCK; token += LANES) {
                    Floats weight = load_floats(scratch.weights + query * BLOCK + token);
                    store(scratch.folded_weights + query * BLOCK + token, weight * load_floats(scales + token));
                    zero_sum += weight * load_floats(zero_points + token);
                }
                store(place, zero_sum);
            }
            weigh_queries(scratch.codes, layout, group * value_format.group, (group + 1) * value_format.group,
                          scratch.folded_weights, queries, scratch.correction, scratch.attended, value_stride);
        }
    }

    // The zero points' share of the values, which all channels of a group have in common.
    void finish() {
        if (!is_folded(value_format)) return;
        int64_t groups = value.dim / value_format.group;
        for (int64_t query = 0; query < queries; query++) {
            for (int64_t group = 0; group < groups; group++) {
                float zero_sum = sum(load_floats(scratch.zero_sums + (query * groups + group) * LANES));
                float* attended = scratch.attended + query * value_stride + group * value_format.group;
                for (int64_t channel = 0; channel < value_format.group; channel++) attended[channel] += zero_sum;
            }
        }
    }
};

}  // namespace

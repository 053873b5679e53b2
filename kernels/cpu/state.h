// Where a row's tokens lie (state.py), and how they are read.

#pragma once

#include "interface.h"
#include "packing.h"

namespace {

constexpr int64_t CACHE_LINE = 64;

// What a call of attend is given.
struct AttendArguments : Attention {
    const Shape& shape;
    const Side &key, &value;
    const BlockFormat &key_format, &value_format;

    // Channels of the values that queries score.
    int64_t scored_values() const { return values_are_keys ? value.dim : 0; }
};

// Of a row that holds so many tokens.
inline int64_t packed_blocks(const Shape& shape, int64_t length) {
    int64_t beyond = length - shape.sinks - shape.recent;
    return beyond > 0 ? (beyond + BLOCK - 1) / BLOCK : 0;
}

// In which pages the tokens or blocks of one row lie (pages.py).
struct RowPages {
    const int32_t* pages;
    int64_t width, size, count;

    RowPages(const Table& table, int64_t row)
        : pages(table.pages + row * table.stride), width(table.width), size(table.size), count(table.count) {}

    explicit operator bool() const { return size; }  // whether there are any
    int64_t page_of(int64_t number) const {  // below zero where there is none
        int64_t index = number / size;
        return index < width ? pages[index] : -1;
    }
    bool has(int64_t number) const { return page_of(number) >= 0; }
    int64_t offset(int64_t number, int64_t head, const Strides& strides) const {
        return page_of(number) * strides.page + head * strides.head + number % size * strides.place;
    }
    // Whether there is a page for all numbers from first to end - 1, or one that there may be.
    bool have(int64_t first, int64_t end, bool may_miss = false) const {
        for (int64_t number = first; number < end; number += size - number % size) {
            int64_t page = page_of(number);
            if (page >= count || (page < 0 && !may_miss)) return false;
        }
        return true;
    }
};

// Where a row's tokens lie (state.py), in tiles of 32 tokens: sinks, packed blocks, and what follows these.
struct Row {
    int64_t length, start, end, sinks, blocks, sink_tiles;
    RowPages raw_pages, packed_pages;

    Row(const Shape& shape, int64_t row)
        : length(shape.lengths[row]), start(shape.starts[row]), end(length + shape.tokens - start),
          sinks(shape.sinks < end ? shape.sinks : end), blocks(packed_blocks(shape, length)),
          sink_tiles((sinks + BLOCK - 1) / BLOCK), raw_pages(shape.raw, row), packed_pages(shape.packed, row) {}

    // Whether all is in a page that a token reads which sees those from `seen` on.
    bool is_readable(const Shape& shape, int64_t seen) const {
        int64_t past_sinks = seen > shape.sinks ? seen - shape.sinks : 0, waiting = shape.sinks + blocks * BLOCK;
        return raw_pages.have(seen, sinks < length ? sinks : length) &&
               packed_pages.have(past_sinks / BLOCK, blocks) &&
               raw_pages.have(seen > waiting ? seen : waiting, length);
    }
    // Whether all is in a page that the blocks which a chunk completes are packed of.
    bool is_packable(const Shape& shape) const {
        int64_t complete = packed_blocks(shape, end);
        if (!packed_pages.have(blocks, complete, true) || !raw_pages.have(length, end, true)) return false;
        for (int64_t block = blocks; block < complete; block++) {
            int64_t first = shape.sinks + block * BLOCK, last = first + BLOCK < length ? first + BLOCK : length;
            if (packed_pages.has(block) && !raw_pages.have(first, last)) return false;
        }
        return true;
    }

    int64_t tile_of(int64_t token) const {
        return token < sinks ? token / BLOCK : sink_tiles + (token - sinks) / BLOCK;
    }
    int64_t first(int64_t tile) const {
        return tile < sink_tiles ? tile * BLOCK : sinks + (tile - sink_tiles) * BLOCK;
    }
    int64_t last(int64_t tile) const {
        int64_t behind = first(tile) + BLOCK, limit = tile < sink_tiles ? sinks : end;
        return behind < limit ? behind : limit;
    }
    int64_t block(int64_t tile) const {  // or -1
        int64_t block = tile - sink_tiles;
        return block >= 0 && block < blocks ? block : -1;
    }
};

// Reads the tokens of one row and head.
template <class Element>
struct Reader {
    const Shape& shape;
    const Row& row;
    int64_t row_index, head;
    int64_t seen = 0;  // tokens before this one are not read

    const uint8_t* block(const Side& side, const BlockFormat& format, int64_t block) const {
        if (row.packed_pages) return side.packed + row.packed_pages.offset(block, head, side.packed_strides);
        int64_t slot = block % shape.capacity;  // a block's own, unless a window's later blocks took it
        return side.packed + ((row_index * shape.heads + head) * shape.capacity + slot) * format.block_bytes;
    }

    const Element* element(const Side& side, int64_t token) const {
        if (token >= row.length)
            return static_cast<const Element*>(side.chunk) + row_index * side.row_stride + head * side.head_stride +
                   (token - row.length + row.start) * side.token_stride;
        return stored(side, token);
    }

    // Where a token lies that is not packed, or will.
    Element* stored(const Side& side, int64_t token) const {
        if (row.raw_pages)
            return reinterpret_cast<Element*>(static_cast<char*>(side.ring) +
                                              row.raw_pages.offset(token, head, side.raw_strides));
        int64_t pair = row_index * shape.heads + head;
        if (token < shape.sinks) return static_cast<Element*>(side.sink) + (pair * shape.sinks + token) * side.dim;
        int64_t slot = (token - shape.sinks) % shape.slots;
        return static_cast<Element*>(side.ring) + (pair * shape.slots + slot) * side.dim;
    }

    // Has a block's bytes on their way: in pages they do not lie behind those of the one before.
    void prefetch(const Side& side, const BlockFormat& format, int64_t number) const {
        const uint8_t* bytes = block(side, format, number);
        for (int64_t i = 0; i < format.block_bytes; i += CACHE_LINE) __builtin_prefetch(bytes + i);
    }

    // Neighbouring tokens, `step` elements apart.
    struct Run {
        const Element* first;
        int64_t step, count;
    };

    // Unquantized tokens from one on, up to `end`.
    Run run(const Side& side, int64_t token, int64_t end) const {
        if (token >= row.length) return {element(side, token), side.token_stride, end - token};
        int64_t count = (end < row.length ? end : row.length) - token, step = side.dim, left;
        if (row.raw_pages) {
            left = row.raw_pages.size - token % row.raw_pages.size;
            step = side.raw_strides.place / int64_t(sizeof(Element));
        } else {
            left = token < shape.sinks ? shape.sinks - token : shape.slots - (token - shape.sinks) % shape.slots;
        }
        return {element(side, token), step, count < left ? count : left};
    }

    // Unquantized tokens of a tile to [32][stride], zeros where there is none or it is not seen.
    void rows(const Side& side, const BlockFormat& format, int64_t tile, float* to, int64_t stride) const {
        int64_t first = row.first(tile), count = row.last(tile) - first, packed = row.block(tile);
        int64_t unseen = packed < 0 && first < seen ? seen - first : 0;
        memset(to, 0, unseen * stride * sizeof(float));
        for (int64_t i = unseen; i < count;) {
            Run run = packed < 0 ? this->run(side, first + i, first + count)
                                 : Run{reinterpret_cast<const Element*>(block(side, format, packed)), side.dim, count};
            for (int64_t end = i + run.count; i < end; i++, run.first += run.step)
                for (int64_t channel = 0; channel < side.dim; channel += LANES)
                    store(to + i * stride + channel, load_first(run.first + channel, side.dim - channel));
        }
        memset(to + count * stride, 0, (BLOCK - count) * stride * sizeof(float));
    }
};

}  // namespace

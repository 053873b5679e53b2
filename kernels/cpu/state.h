// What the kernels are given, and where a row's tokens lie (state.py).

#pragma once

#include "packing.h"

namespace {

enum ElementType : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// Laid out as cpu.py packs them: every member has eight bytes.

// Channels that are stored with so many bits (Part of precision.py).
struct Part {
    int64_t channels, bits;
};

// The keys or the values: a chunk, strides in elements, and the state's contiguous tensors.
struct Side {
    const void* chunk;
    int64_t row_stride, head_stride, token_stride;
    void* sink;
    const uint8_t* packed;
    void* tail;
    int64_t dim, bits, group, scale_bits, block_bytes, part_count;
    Part parts[4];  // of a block, in order
};

struct Shape {
    const int64_t *lengths, *starts;
    int64_t element, rows, heads, tokens, sinks, room, slots, recent;
};

struct AttendArguments {
    Shape shape;
    Side key, value;
    const void* q;
    int64_t row_stride, head_stride, token_stride;
    float* output;  // [rows, heads * shared, tokens, value.dim]
    int64_t shared, sliding_window, attention_chunk;
    const float *sink_logits, *slopes;  // [heads * shared], or null
    int64_t threads;
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of PyTorch's OpenMP runtime
    double scale, softcap;
};

struct AppendArguments {
    Shape shape;
    Side key, value;
};

// Where a row's tokens lie (state.py), in tiles of 32 tokens: sinks, packed blocks, and what follows these.
struct Row {
    int64_t length, start, end, sinks, blocks, sink_tiles;

    Row(const Shape& shape, int64_t row)
        : length(shape.lengths[row]), start(shape.starts[row]), end(length + shape.tokens - start),
          sinks(shape.sinks < end ? shape.sinks : end), blocks(0) {
        int64_t beyond = length - shape.sinks - shape.recent;
        if (beyond > 0) blocks = (beyond + BLOCK - 1) / BLOCK;
        sink_tiles = (sinks + BLOCK - 1) / BLOCK;
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
    const AttendArguments& arguments;
    const Row& row;
    int64_t row_index, head;

    const uint8_t* block(const Side& side, int64_t block) const {
        const Shape& shape = arguments.shape;
        int64_t place = block % shape.room;  // a block's own, unless a window's later blocks took it
        return side.packed + ((row_index * shape.heads + head) * shape.room + place) * side.block_bytes;
    }

    const Element* element(const Side& side, int64_t token) const {
        const Shape& shape = arguments.shape;
        if (token >= row.length)
            return static_cast<const Element*>(side.chunk) + row_index * side.row_stride + head * side.head_stride +
                   (token - row.length + row.start) * side.token_stride;
        int64_t pair = row_index * shape.heads + head;
        if (token < shape.sinks)
            return static_cast<const Element*>(side.sink) + (pair * shape.sinks + token) * side.dim;
        int64_t slot = (token - shape.sinks) % shape.slots;
        return static_cast<const Element*>(side.tail) + (pair * shape.slots + slot) * side.dim;
    }

    // Unquantized tokens of a tile to [32][stride], zeros where there is none.
    void rows(const Side& side, int64_t tile, float* to, int64_t stride) const {
        int64_t first = row.first(tile), count = row.last(tile) - first, packed = row.block(tile);
        for (int64_t i = 0; i < count; i++) {
            const Element* from = packed < 0 ? element(side, first + i)
                                             : reinterpret_cast<const Element*>(block(side, packed)) + i * side.dim;
            for (int64_t channel = 0; channel < side.dim; channel += LANES)
                store(to + i * stride + channel, load_first(from + channel, side.dim - channel));
        }
        memset(to + count * stride, 0, (BLOCK - count) * stride * sizeof(float));
    }
};

}  // namespace

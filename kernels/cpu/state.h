// Where a row's tokens lie (state.py), and how they are read.

#pragma once

#include "interface.h"
#include "packing.h"

namespace {

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

// Where a row's tokens lie (state.py), in tiles of 32 tokens: sinks, packed blocks, and what follows these.
struct Row {
    int64_t length, start, end, sinks, blocks, sink_tiles;

    Row(const Shape& shape, int64_t row)
        : length(shape.lengths[row]), start(shape.starts[row]), end(length + shape.tokens - start),
          sinks(shape.sinks < end ? shape.sinks : end), blocks(packed_blocks(shape, length)),
          sink_tiles((sinks + BLOCK - 1) / BLOCK) {}

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

// Reads the tokens of one row and head: new ones are Element, those of the state Kept.
template <class Element, class Kept>
struct Reader {
    const Shape& shape;
    const Row& row;
    int64_t row_index, head;

    const uint8_t* block(const Side& side, const BlockFormat& format, int64_t block) const {
        int64_t slot = block % shape.capacity;  // a block's own, unless a window's later blocks took it
        return side.packed + ((row_index * shape.heads + head) * shape.capacity + slot) * format.block_bytes;
    }

    // Calls use with where the elements of a token that is not packed lie.
    template <class Use>
    void with_token(const Side& side, int64_t token, Use use) const {
        if (token >= row.length)
            return use(static_cast<const Element*>(side.chunk) + row_index * side.row_stride +
                       head * side.head_stride + (token - row.length + row.start) * side.token_stride);
        int64_t pair = row_index * shape.heads + head;
        if (token < shape.sinks) return use(static_cast<const Kept*>(side.sink) + (pair * shape.sinks + token) * side.dim);
        int64_t slot = (token - shape.sinks) % shape.slots;
        use(static_cast<const Kept*>(side.ring) + (pair * shape.slots + slot) * side.dim);
    }

    // Unquantized tokens of a tile to [32][stride], zeros where there is none.
    void rows(const Side& side, const BlockFormat& format, int64_t tile, float* to, int64_t stride) const {
        int64_t first = row.first(tile), count = row.last(tile) - first, packed = row.block(tile);
        for (int64_t i = 0; i < count; i++) {
            auto read = [&](const auto* from) {
                for (int64_t channel = 0; channel < side.dim; channel += LANES)
                    store(to + i * stride + channel, load_first(from + channel, side.dim - channel));
            };
            if (packed < 0)
                with_token(side, first + i, read);
            else
                read(reinterpret_cast<const Kept*>(block(side, format, packed)) + i * side.dim);
        }
        memset(to + count * stride, 0, (BLOCK - count) * stride * sizeof(float));
    }
};

}  // namespace

// What a call is given. interface.py declares the same structures and, as a library is loaded, compares where their
// members lie.

#pragma once

#include <cstddef>
#include <cstdint>

enum ElementType : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// Channels that are stored with so many bits (Part of precision.py). Of scales and zero points in 4 bits (packing.py):
// the share of a group's range that is cut off at either end, and what is added before their places are rounded.
struct Part {
    int64_t channels, bits;
    double margin, zero_point_bias, log2_scale_bias;
};

// How a packed block of keys or of values is stored.
struct BlockFormat {
    int64_t bits, group, scale_bits, block_bytes, part_count;
    Part parts[4];  // of a block, in order
};

// From page to page of a pool, from head to head and from token or block to the next, in bytes.
struct Strides {
    int64_t page, head, place;
};

// The keys or the values: a chunk, strides in elements, and the state's contiguous tensors. Or, of pages (pages.py), the
// pool of raw ones as sink and as ring, and the pool of packed ones.
struct Side {
    const void* chunk;
    int64_t row_stride, head_stride, token_stride, dim;
    void* sink;
    const uint8_t* packed;
    void* ring;
    Strides raw_strides, packed_strides;  // of pages
};

// In which of `count` pages rows' tokens or blocks lie, `size` to a page: [rows][width], from row to row `stride` numbers.
struct Table {
    const int32_t* pages;
    int64_t stride, width, size, count;  // size 0: there are no pages
};

struct Shape {
    const int64_t *lengths, *starts;
    int64_t element, rows, heads, tokens, sinks, capacity, slots, recent;
    Table raw, packed;
};

// GOMP_parallel of PyTorch's OpenMP runtime.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// On how many threads.
struct Threads {
    int64_t count;
    Parallel parallel;  // or null
};

// The queries, what becomes of them, and how scores are weighted (weighting.py); strides in elements.
struct Attention {
    const void* query;
    int64_t row_stride, head_stride, token_stride, shared;
    int64_t values_are_keys;  // queries have channels for the values too, which come first
    float* output;  // [rows, heads * shared, tokens, value.dim]
    double scale, softcap;
    int64_t sliding_window, attention_chunk;
    const float *sink_logits, *slopes;  // [heads * shared], or null
};

// A structure, or a member of one, in bytes.
struct Extent {
    const char* name;
    int64_t offset, size;
};

#define STRUCTURE(structure) {#structure, 0, sizeof(structure)}
#define MEMBER(structure, member) {#structure "." #member, offsetof(structure, member), sizeof(structure::member)}

// All of them, up to one without a name.
extern "C" const Extent* kvmix_extents() {
    static const Extent extents[] = {
        STRUCTURE(Part), MEMBER(Part, channels), MEMBER(Part, bits), MEMBER(Part, margin),
        MEMBER(Part, zero_point_bias), MEMBER(Part, log2_scale_bias),
        STRUCTURE(BlockFormat), MEMBER(BlockFormat, bits), MEMBER(BlockFormat, group), MEMBER(BlockFormat, scale_bits),
        MEMBER(BlockFormat, block_bytes), MEMBER(BlockFormat, part_count), MEMBER(BlockFormat, parts),
        STRUCTURE(Strides), MEMBER(Strides, page), MEMBER(Strides, head), MEMBER(Strides, place),
        STRUCTURE(Side), MEMBER(Side, chunk), MEMBER(Side, row_stride), MEMBER(Side, head_stride),
        MEMBER(Side, token_stride), MEMBER(Side, dim), MEMBER(Side, sink), MEMBER(Side, packed), MEMBER(Side, ring),
        MEMBER(Side, raw_strides), MEMBER(Side, packed_strides),
        STRUCTURE(Table), MEMBER(Table, pages), MEMBER(Table, stride), MEMBER(Table, width), MEMBER(Table, size),
        MEMBER(Table, count),
        STRUCTURE(Shape), MEMBER(Shape, lengths), MEMBER(Shape, starts), MEMBER(Shape, element), MEMBER(Shape, rows),
        MEMBER(Shape, heads), MEMBER(Shape, tokens), MEMBER(Shape, sinks), MEMBER(Shape, capacity), MEMBER(Shape, slots),
        MEMBER(Shape, recent), MEMBER(Shape, raw), MEMBER(Shape, packed),
        STRUCTURE(Threads), MEMBER(Threads, count), MEMBER(Threads, parallel),
        STRUCTURE(Attention), MEMBER(Attention, query), MEMBER(Attention, row_stride), MEMBER(Attention, head_stride),
        MEMBER(Attention, token_stride), MEMBER(Attention, shared), MEMBER(Attention, values_are_keys), MEMBER(Attention, output), MEMBER(Attention, scale),
        MEMBER(Attention, softcap), MEMBER(Attention, sliding_window), MEMBER(Attention, attention_chunk),
        MEMBER(Attention, sink_logits), MEMBER(Attention, slopes),
        {nullptr, 0, 0},
    };
    return extents;
}

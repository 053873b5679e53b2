// Packed blocks (packing.py): codes become bytes, scales and zero points float32.

#pragma once

#include "vectors.h"

namespace {

constexpr int BLOCK = 32;  // tokens
constexpr int EXTREMES_BYTES = 8;
constexpr float NIBBLE_LEVELS = 15;
constexpr int BYTES_BEYOND = 16;  // for each token, what unpacking may write behind the last channel

// Of each byte's fields, STEP bits apart, the lowest WIDTH bits: the first field's to `to`, each next one's
// `field_stride` further on. Reads, and writes behind each field, less than a vector more; what it writes there the
// next field, or row, overwrites. Behind a plane there are always 15 bytes to be read: metadata, if nothing else.
template <class Vector, int WIDTH, int STEP = WIDTH>
inline void spread(const uint8_t* from, int64_t count, uint8_t* to, int64_t field_stride) {
    constexpr uint32_t MASK = 0x01010101u * ((1 << WIDTH) - 1);
#pragma GCC unroll 8
    for (int field = 0; field < 8 / STEP; field++)
        for (int64_t i = 0; i < count; i += sizeof(Vector))
            store(to + field * field_stride + i, load<Vector>(from + i) >> (field * STEP) & MASK);
}

// The codes of 3 bits: what the low plane gave, and 4 where the high plane has its bit.
inline void add_high_plane(uint8_t* codes, const uint8_t* high, int64_t count) {
    for (int64_t i = 0; i < count; i += sizeof(WideWords))
        store(codes + i, load<WideWords>(codes + i) | load<WideWords>(high + i) << 2);
}

// One plane of keys' codes (packing.py) to [dim][32].
template <int WIDTH>
inline void unpack_keys_plane(const uint8_t* plane, int64_t dim, uint8_t* codes, uint8_t* turned) {
    int64_t bytes = dim * WIDTH / 8;
    for (int64_t byte = 0; byte < bytes; byte += BYTE_LANES)
        for (int token = 0; token < BLOCK; token += BYTE_LANES)
            transpose<Bytes, BYTE_LANES>(plane + token * bytes + byte, bytes, turned + byte * BLOCK + token, BLOCK);
    spread<WideWords, WIDTH>(turned, bytes * BLOCK, codes, bytes * BLOCK);
}

// Codes of 32 tokens to [dim][32]. high, turned: room for as much.
void unpack_keys(const uint8_t* packed, int64_t bits, int64_t dim, uint8_t* codes, uint8_t* high, uint8_t* turned) {
    switch (bits) {
        case 1: return unpack_keys_plane<1>(packed, dim, codes, turned);
        case 2: return unpack_keys_plane<2>(packed, dim, codes, turned);
        case 4: return unpack_keys_plane<4>(packed, dim, codes, turned);
        case 8: return unpack_keys_plane<8>(packed, dim, codes, turned);
    }
    unpack_keys_plane<2>(packed, dim, codes, turned);
    unpack_keys_plane<1>(packed + BLOCK * dim / 4, dim, high, turned);
    add_high_plane(codes, high, BLOCK * dim);
}

// Where a vector of channels of 32 tokens' values lies: tokens are `token_stride` apart; slices of `slice` channels, of
// which each has all tokens, `slice_stride`.
struct ValueLayout {
    int64_t token_stride, slice, slice_stride;

    int64_t place(int64_t channel) const { return channel / slice * slice_stride + channel % slice; }
};

// One plane of values' codes (packing.py) in rows of `stride` channels.
template <int WIDTH>
inline void unpack_values_plane(const uint8_t* plane, int64_t dim, uint8_t* codes, int64_t stride) {
    int64_t bytes = dim * WIDTH / 8;
    for (int token = 0; token < BLOCK; token++)
        spread<Words, WIDTH>(plane + token * bytes, bytes, codes + token * stride, bytes);
}

// A plane of one-bit codes as if it were one of two bits, of which only the lower count.
inline void stretch_plane(const uint8_t* plane, int64_t bytes, uint8_t* stretched) {
    for (int token = 0; token < BLOCK; token++, plane += bytes, stretched += 2 * bytes) {
        for (int64_t i = 0; i < bytes; i += 8) store(stretched + i, load<uint64_t>(plane + i));
        for (int64_t i = 0; i < bytes; i += 8) store(stretched + bytes + i, load<uint64_t>(plane + i) >> 1);
    }
}

// Codes of 32 tokens, of which what lies beyond dim means nothing. high, turned: room for as much.
// Where vectors of channels do not straddle the fields of a plane, all tokens of a field stay together.
ValueLayout unpack_values(const uint8_t* packed, int64_t bits, int64_t dim, uint8_t* codes, uint8_t* high,
                          uint8_t* turned) {
    int64_t field = bits == 8 ? dim : bits == 4 ? dim / 2 : dim / 4, count = BLOCK * field;
    const uint8_t* high_plane = packed + (bits == 3 ? BLOCK * dim / 4 : 0);
    if (field % LANES == 0) {
        if (bits == 1 || bits == 3) stretch_plane(high_plane, dim / 8, turned);
        switch (bits) {
            case 1: spread<WideWords, 1, 2>(turned, count, codes, count); break;
            case 2: spread<WideWords, 2>(packed, count, codes, count); break;
            case 3: spread<WideWords, 2>(packed, count, codes, count); break;
            case 4: spread<WideWords, 4>(packed, count, codes, count); break;
            case 8: spread<WideWords, 8>(packed, count, codes, count); break;
        }
        if (bits == 3) {
            spread<WideWords, 1, 2>(turned, count, high, count);
            add_high_plane(codes, high, BLOCK * dim);
        }
        return {field, field, count};
    }
    int64_t stride = round_up(dim, LANES);
    switch (bits) {
        case 1: unpack_values_plane<1>(packed, dim, codes, stride); break;
        case 2: unpack_values_plane<2>(packed, dim, codes, stride); break;
        case 3: unpack_values_plane<2>(packed, dim, codes, stride); break;
        case 4: unpack_values_plane<4>(packed, dim, codes, stride); break;
        case 8: unpack_values_plane<8>(packed, dim, codes, stride); break;
    }
    if (bits == 3) {
        unpack_values_plane<1>(high_plane, dim, high, stride);
        add_high_plane(codes, high, BLOCK * stride);
    }
    return {stride, stride, 0};
}

inline int64_t code_bytes(int64_t dim, int64_t bits) { return BLOCK * dim * bits / 8; }

inline int64_t metadata_bytes(int64_t groups, int64_t scale_bits) {
    return scale_bits == 16 ? 2 * groups * sizeof(Float16) : EXTREMES_BYTES + groups;
}

inline void dequantize(const uint8_t* codes, int64_t count, float scale, float zero_point, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_floats(codes + i) * scale + zero_point);
    for (; i < count; i++) to[i] = codes[i] * scale + zero_point;
}

// Scales and zero points of so many groups; up to LANES more of them are written.
void read_float16_metadata(const Float16* scales, const Float16* zero_points, int64_t groups, float* to_scales,
                           float* to_zero_points) {
    for (int64_t i = 0; i < groups; i += LANES) {
        store(to_scales + i, load_first(scales + i, groups - i));
        store(to_zero_points + i, load_first(zero_points + i, groups - i));
    }
}

void read_nibble_metadata(const uint8_t* extremes, const uint8_t* nibbles, int64_t groups, float* scales,
                          float* zero_points) {
    float numbers[4];
    for (int i = 0; i < 4; i++) numbers[i] = from_half(int32_t(load<uint16_t>(extremes + 2 * i)));
    float log2_step = (numbers[1] - numbers[0]) / NIBBLE_LEVELS;
    float zero_point_step = (numbers[3] - numbers[2]) / NIBBLE_LEVELS;
    for (int64_t i = 0; i < groups; i += LANES) {
        uint8_t padded[LANES] = {};
        if (i + LANES > groups) memcpy(padded, nibbles + i, groups - i);
        Ints both = widen(load<Codes>(i + LANES > groups ? padded : nibbles + i));
        store(scales + i, exp2(to_floats(both & 15) * log2_step + numbers[0]));
        store(zero_points + i, to_floats(both >> 4) * zero_point_step + numbers[2]);
    }
}

// In the order they are stored. Returns the metadata's bytes.
int64_t read_metadata(const uint8_t* metadata, int64_t groups, int64_t scale_bits, float* scales, float* zero_points) {
    if (scale_bits == 16) {
        const Float16* halves = reinterpret_cast<const Float16*>(metadata);
        read_float16_metadata(halves, halves + groups, groups, scales, zero_points);
    } else {
        read_nibble_metadata(metadata, metadata + EXTREMES_BYTES, groups, scales, zero_points);
    }
    return metadata_bytes(groups, scale_bits);
}

template <int GROUPS, class Number>
inline void turn(const Number* from, Number* to) {
    for (int group = 0; group < GROUPS; group++)
        for (int token = 0; token < BLOCK; token++) to[group * BLOCK + token] = from[token * GROUPS + group];
}

// [32][groups] to [groups][32].
template <class Number>
void turn(const Number* from, int64_t groups, Number* to) {
    switch (groups) {
        case 1: return turn<1>(from, to);
        case 2: return turn<2>(from, to);
        case 4: return turn<4>(from, to);
    }
    for (int64_t group = 0; group < groups; group++)
        for (int token = 0; token < BLOCK; token++) to[group * BLOCK + token] = from[token * groups + group];
}

// Scales and zero points of values, [groups of a token][32]. turned: room for 4 bytes of each.
void read_turned_metadata(const uint8_t* metadata, int64_t groups, int64_t scale_bits, uint8_t* turned, float* scales,
                          float* zero_points) {
    int64_t count = BLOCK * groups;
    if (scale_bits == 16) {
        const Float16* halves = reinterpret_cast<const Float16*>(metadata);
        Float16* turned_halves = reinterpret_cast<Float16*>(turned);
        turn(halves, groups, turned_halves);
        turn(halves + count, groups, turned_halves + count);
        read_float16_metadata(turned_halves, turned_halves + count, count, scales, zero_points);
        return;
    }
    turn(metadata + EXTREMES_BYTES, groups, turned);
    read_nibble_metadata(metadata, turned, count, scales, zero_points);
}

}  // namespace

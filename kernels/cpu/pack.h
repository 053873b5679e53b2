// Quantizes blocks of 32 tokens: the bytes that packing.py's quantize_block gives, and so each operation is rounded as it
// is there. A group's elements are steps of a column here, so that a vector has neighbouring groups: of keys a column is
// a channel and a step a token, of values a token and a channel.

#pragma once

#include <cmath>
#include <vector>

#include "state.h"

namespace {

constexpr float FLOAT16_MAX = 65504;
constexpr float LOG2_SCALE_RANGE = 8, SMALLEST_SCALE = 0x1p-24f;

// A product that is rounded before anything is added to it: a compiler may not make one operation of both.
__attribute__((noinline)) Floats product(Floats a, Floats b) { return a * b; }

inline Floats smallest(Floats a, Floats b) { return a < b ? a : b; }
inline Floats between_zero_and(float highest, Floats x) {
    return smallest(largest(x, Floats{}), broadcast(highest));
}
inline Floats rounded(Floats x) { return to_floats(to_nearest(x)); }

// To the nearest, ties to even.
inline uint16_t to_half(float number) {
    uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    // Below half precision's normal numbers: 1/2 has the last bit that is kept where it belongs.
    if (magnitude < 0x38800000) return sign | (bits_of(floats_of(int32_t(magnitude)) + 0.5f) - bits_of(0.5f));
    return sign | (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
}
inline float half_of(float number) { return from_half(int32_t(to_half(number))); }

// Numbers in fifteenths of their range, as packing.py's _to_nibble and _from_nibble have them.
struct NibbleRange {
    float lowest, step;

    NibbleRange(float lowest, float highest) : lowest(lowest), step((highest - lowest) / NIBBLE_LEVELS) {}

    Floats to_nibble(Floats numbers, float bias) const {
        Floats place = (numbers - lowest) / (step == 0 ? INFINITY : step) + bias;
        return rounded(between_zero_and(NIBBLE_LEVELS, place));
    }
    Floats from_nibble(Floats nibbles) const { return product(nibbles, broadcast(step)) + lowest; }
};

// Where a thread packs a block.
struct PackScratch {
    std::vector<float> rows, columns, lowest, highest, zero_points;
    std::vector<uint8_t> codes, turned, block;

    void reserve(int64_t dim, int64_t block_bytes) {
        block.resize(block_bytes);
        int64_t count = BLOCK * round_up(dim, LANES);
        for (auto* floats : {&rows, &columns, &lowest, &highest, &zero_points}) floats->resize(count + LANES);
        for (auto* bytes : {&codes, &turned}) bytes->resize(count + BYTE_LANES * BLOCK);
    }
};

// Groups of `group` steps in `count` columns. elements: [steps][stride], read up to a multiple of LANES.
struct Columns {
    const float* elements;
    int64_t steps, count, stride, group;

    int64_t groups() const { return steps / group; }
};

class Packer {
    const Columns& columns;
    const Part& part;
    int64_t scale_bits;
    PackScratch& scratch;
    float levels;

  public:
    Packer(const Columns& columns, const Part& part, int64_t scale_bits, PackScratch& scratch)
        : columns(columns), part(part), scale_bits(scale_bits), scratch(scratch), levels((1 << part.bits) - 1) {}

    // Leaves codes in scratch, [steps][stride]. Metadata of a group and column go to metadata + number(group, column).
    template <class Number>
    void pack(uint8_t* metadata, Number number) {
        find_range();
        if (scale_bits == 4)
            write_nibbles(metadata, number);
        else
            write_float16(metadata, number);
        write_codes();
    }

  private:
    // Calls use(group, where the group's metadata of LANES columns lie in scratch).
    template <class Use>
    void for_metadata(Use use) {
        for (int64_t group = 0; group < columns.groups(); group++)
            for (int64_t column = 0; column < columns.count; column += LANES) use(group * columns.stride + column);
    }

    // Calls use(group and column, where its metadata lie in scratch).
    template <class Use>
    void for_each(Use use) {
        for (int64_t group = 0; group < columns.groups(); group++)
            for (int64_t column = 0; column < columns.count; column++)
                use(group, column, group * columns.stride + column);
    }

    void find_range() {
        for (int64_t group = 0; group < columns.groups(); group++) {
            for (int64_t column = 0; column < columns.count; column += LANES) {
                const float* from = columns.elements + group * columns.group * columns.stride + column;
                Floats low = load_floats(from), high = low, sum = low;
                for (int64_t step = 1; step < columns.group; step++) {
                    Floats element = load_floats(from + step * columns.stride);
                    low = smallest(element, low), high = largest(element, high), sum += element;
                }
                // Comparisons leave out what is no number, a sum does not.
                store(&scratch.lowest[group * columns.stride + column], sum == sum ? low : sum);
                store(&scratch.highest[group * columns.stride + column], sum == sum ? high : sum);
            }
        }
    }

    // Of all groups, in half precision. What is no number makes the block none.
    NibbleRange range_of(const float* numbers, uint8_t* to) {
        float low = INFINITY, high = -INFINITY, sum = 0;
        for_each([&](int64_t, int64_t, int64_t place) {
            float number = numbers[place];
            low = number < low ? number : low, high = number > high ? number : high, sum += number;
        });
        if (sum != sum) low = high = sum;
        uint16_t halves[2] = {to_half(low), to_half(high)};
        memcpy(to, halves, sizeof(halves));
        return NibbleRange(half_of(low), half_of(high));
    }

    template <class Number>
    void write_nibbles(uint8_t* metadata, Number number) {
        float *lowest = scratch.lowest.data(), *highest = scratch.highest.data();
        float* zero_points = scratch.zero_points.data();
        for_metadata([&](int64_t place) {
            Floats low = load_floats(&lowest[place]), high = load_floats(&highest[place]);
            Floats margin = product(high - low, broadcast(part.margin));
            store(&lowest[place], low + margin), store(&highest[place], high - margin);
        });
        NibbleRange zero_point_range = range_of(lowest, metadata + EXTREMES_BYTES / 2);
        uint8_t* nibbles = metadata + EXTREMES_BYTES;
        for_metadata([&](int64_t place) {
            Floats nibble = zero_point_range.to_nibble(load_floats(&lowest[place]), part.zero_point_bias);
            Floats zero_point = zero_point_range.from_nibble(nibble);
            store(&zero_points[place], zero_point), store(&lowest[place], nibble);
            // The scale makes up for a zero point that was rounded.
            Floats scale = (load_floats(&highest[place]) - zero_point) / levels;
            store(&highest[place], largest(scale, broadcast(SMALLEST_SCALE)));
        });
        float coarsest = -INFINITY;
        for_each([&](int64_t group, int64_t column, int64_t place) {
            nibbles[number(group, column)] = uint8_t(lowest[place]) << 4;
            highest[place] = std::log2(double(highest[place]));
            coarsest = highest[place] > coarsest ? highest[place] : coarsest;
        });
        for_metadata([&](int64_t place) {
            store(&highest[place], largest(load_floats(&highest[place]), broadcast(coarsest - LOG2_SCALE_RANGE)));
        });
        NibbleRange range = range_of(highest, metadata);
        float scales[16];
        for (int nibble = 0; nibble < 16; nibble++)
            scales[nibble] = std::exp2(double(range.from_nibble(broadcast(nibble))[0]));
        for_metadata([&](int64_t place) {
            store(&highest[place], range.to_nibble(load_floats(&highest[place]), part.log2_scale_bias));
        });
        for_each([&](int64_t group, int64_t column, int64_t place) {
            int nibble = highest[place];
            nibbles[number(group, column)] |= nibble;
            highest[place] = scales[nibble];
        });
    }

    template <class Number>
    void write_float16(uint8_t* metadata, Number number) {
        int64_t count = columns.groups() * columns.count;
        for_each([&](int64_t group, int64_t column, int64_t place) {
            uint16_t zero_point = to_half(scratch.lowest[place]);
            scratch.zero_points[place] = from_half(int32_t(zero_point));
            float scale = (scratch.highest[place] - scratch.zero_points[place]) / levels;
            uint16_t half = to_half(scale < 0 ? 0 : scale > FLOAT16_MAX ? FLOAT16_MAX : scale);
            scratch.highest[place] = from_half(int32_t(half));
            memcpy(metadata + sizeof(half) * number(group, column), &half, sizeof(half));
            memcpy(metadata + sizeof(half) * (count + number(group, column)), &zero_point, sizeof(half));
        });
    }

    // Codes answer to the scales and zero points as a reader will find them.
    void write_codes() {
        for_metadata([&](int64_t place) {
            Floats scale = load_floats(&scratch.highest[place]), zero_point = load_floats(&scratch.zero_points[place]);
            Floats step = scale == 0 ? broadcast(INFINITY) : scale;
            int64_t group = place / columns.stride, column = place % columns.stride;
            int64_t first = group * columns.group * columns.stride + column;
            for (int64_t i = 0; i < columns.group; i++, first += columns.stride) {
                Floats code = (load_floats(columns.elements + first) - zero_point) / step;
                Ints whole = to_nearest(between_zero_and(levels, code));
                store(&scratch.codes[first], __builtin_convertvector(whole, Codes));
            }
        });
    }
};

// One plane of codes (packing.py): WIDTH bits of each, from `below` on. codes: [32][stride].
inline void pack_plane(const uint8_t* codes, int64_t stride, int64_t dim, int width, int below, uint8_t* plane) {
    int64_t bytes = dim * width / 8;
    uint8_t mask = (1 << width) - 1;
    for (int token = 0; token < BLOCK; token++, codes += stride, plane += bytes) {
        for (int64_t byte = 0; byte < bytes; byte++) plane[byte] = codes[byte] >> below & mask;
        for (int field = 1; field < 8 / width; field++)
            for (int64_t byte = 0; byte < bytes; byte++)
                plane[byte] |= (codes[field * bytes + byte] >> below & mask) << field * width;
    }
}

inline void pack_codes(const uint8_t* codes, int64_t stride, int64_t dim, int64_t bits, uint8_t* packed) {
    if (bits != 3) return pack_plane(codes, stride, dim, bits, 0, packed);
    pack_plane(codes, stride, dim, 2, 0, packed);
    pack_plane(codes, stride, dim, 1, 2, packed + BLOCK * dim / 4);
}

// Blocks of one row and head.
template <class Element>
struct BlockWriter {
    const Shape& shape;
    Reader<Element> reader;
    PackScratch& scratch;

    int64_t first_token(int64_t block) const { return shape.sinks + block * BLOCK; }

    void write(const Side& side, const BlockFormat& format, bool is_keys, int64_t block) {
        uint8_t* target = const_cast<uint8_t*>(reader.block(side, format, block));
        if (format.bits == 16) {
            int64_t bytes = side.dim * sizeof(Element);
            for (int i = 0; i < BLOCK; i++, target += bytes)
                memcpy(target, reader.element(side, first_token(block) + i), bytes);
            return;
        }
        scratch.reserve(side.dim, format.block_bytes);
        int64_t stride = round_up(side.dim, LANES);
        for (int i = 0; i < BLOCK; i++) {
            const Element* from = reader.element(side, first_token(block) + i);
            for (int64_t channel = 0; channel < side.dim; channel += LANES) {
                Floats elements = clamp(load_first(from + channel, side.dim - channel), FLOAT16_MAX);
                store(&scratch.rows[i * stride + channel], elements);
            }
        }
        if (is_keys)
            write_keys(side, format, stride, scratch.block.data());
        else
            write_values(side, format, stride, scratch.block.data());
        // Codes are put together bit by bit. Where rows share a page, other threads may write the same bytes at the same
        // time: none is to find a byte that is not whole yet.
        memcpy(target, scratch.block.data(), format.block_bytes);
    }

  private:
    void write_keys(const Side& side, const BlockFormat& format, int64_t stride, uint8_t* packed) {
        int64_t first = 0;
        for (int64_t i = 0; i < format.part_count; i++) {
            const Part& part = format.parts[i];
            Columns columns{&scratch.rows[first], BLOCK, part.channels, stride, format.group};
            uint8_t* metadata = packed + code_bytes(part.channels, part.bits);
            auto number = [&](int64_t group, int64_t channel) { return group * part.channels + channel; };
            Packer(columns, part, format.scale_bits, scratch).pack(metadata, number);
            pack_codes(scratch.codes.data(), stride, part.channels, part.bits, packed);
            packed = metadata + metadata_bytes(columns.groups() * part.channels, format.scale_bits);
            first += part.channels;
        }
    }

    void write_values(const Side& side, const BlockFormat& format, int64_t stride, uint8_t* packed) {
        for (int token = 0; token < BLOCK; token += LANES)
            for (int64_t channel = 0; channel < stride; channel += LANES)
                transpose<Floats, LANES>(&scratch.rows[token * stride + channel], stride,
                                         &scratch.columns[channel * BLOCK + token], BLOCK);
        Columns columns{scratch.columns.data(), side.dim, BLOCK, BLOCK, format.group};
        const Part& part = format.parts[0];
        auto number = [&](int64_t group, int64_t token) { return token * columns.groups() + group; };
        Packer(columns, part, format.scale_bits, scratch).pack(packed + code_bytes(side.dim, part.bits), number);
        int64_t row_bytes = round_up(side.dim, BYTE_LANES);
        for (int64_t channel = 0; channel < side.dim; channel += BYTE_LANES)
            for (int token = 0; token < BLOCK; token += BYTE_LANES)
                transpose<Bytes, BYTE_LANES>(&scratch.codes[channel * BLOCK + token], BLOCK,
                                             &scratch.turned[token * row_bytes + channel], row_bytes);
        pack_codes(scratch.turned.data(), row_bytes, side.dim, part.bits, packed);
    }
};

}  // namespace

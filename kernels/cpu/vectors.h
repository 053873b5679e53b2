// Vectors of GCC and Clang, as wide as the processor's registers, and what the kernels do with them. Nothing here is
// written for one instruction set alone.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int BYTE_LANES = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Codes __attribute__((vector_size(LANES)));
typedef uint8_t Bytes __attribute__((vector_size(BYTE_LANES)));
typedef uint32_t Words __attribute__((vector_size(BYTE_LANES)));
typedef uint32_t WideWords __attribute__((vector_size(4 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

template <class Vector>
inline Vector load(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof(Vector));
    return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
    memcpy(to, &vector, sizeof(Vector));
}

// GCC makes eight instructions of a conversion for which the processor has one.
#if defined(__AVX512F__)
inline Ints widen(Codes codes) { return (Ints)_mm512_cvtepu8_epi32((__m128i)codes); }
inline Ints widen(Halves halves) { return (Ints)_mm512_cvtepu16_epi32((__m256i)halves); }
#elif defined(__AVX2__)
inline Ints widen(Codes codes) { return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)codes)); }
inline Ints widen(Halves halves) { return (Ints)_mm256_cvtepu16_epi32((__m128i)halves); }
#else
inline Ints widen(Halves halves) { return __builtin_convertvector(halves, Ints); }
inline Ints widen(Codes codes) { return widen(__builtin_convertvector(codes, Halves)); }
#endif

inline Floats broadcast(float number) { return number - Floats{}; }

inline Ints bits_of(Floats floats) { return reinterpret_cast<Ints>(floats); }
inline Floats floats_of(Ints bits) { return reinterpret_cast<Floats>(bits); }
inline Floats to_floats(Ints numbers) { return __builtin_convertvector(numbers, Floats); }

inline int32_t bits_of(float number) { return load<int32_t>(&number); }
inline float floats_of(int32_t bits) { return load<float>(&bits); }
inline float to_floats(int32_t number) { return number; }

inline Floats load_floats(const float* from) { return load<Floats>(from); }

inline Floats load_floats(const uint8_t* from) { return to_floats(widen(load<Codes>(from))); }

inline Floats load_floats(const Bfloat16* from) { return floats_of(widen(load<Halves>(from)) << 16); }

// One number, or a vector of them.
template <class Integers>
inline auto from_half(Integers half) {
    Integers magnitude = half & 0x7fff, bias = Integers{} + (112 << 23);
    // Shifted into place a half's exponent is too small by 112, that of infinities and NaN by as much again.
    Integers normal = (magnitude << 13) + (magnitude >= 0x7c00 ? bias + bias : bias);
    Integers subnormal = bits_of(to_floats(magnitude) * 0x1p-24f);
    return floats_of((magnitude < 0x400 ? subnormal : normal) | (half & 0x8000) << 16);
}

// To the nearest, ties to even.
inline uint16_t to_half(float number) {
    uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    // Below half precision's normal numbers: 1/2 has the last bit that is kept where it belongs.
    if (magnitude < 0x38800000) return sign | (bits_of(floats_of(int32_t(magnitude)) + 0.5f) - bits_of(0.5f));
    return sign | (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

// Of one conversion, too, GCC makes many instructions.
#if defined(__AVX512F__)
inline Floats load_floats(const Float16* from) { return (Floats)_mm512_cvtph_ps((__m256i)load<Halves>(from)); }
inline Halves to_halves(Floats floats) {
    return (Halves)_mm512_cvtps_ph((__m512)floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Floats load_floats(const Float16* from) { return (Floats)_mm256_cvtph_ps((__m128i)load<Halves>(from)); }
inline Halves to_halves(Floats floats) { return (Halves)_mm256_cvtps_ph((__m256)floats, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Floats load_floats(const Float16* from) { return from_half(widen(load<Halves>(from))); }
inline Halves to_halves(Floats floats) {
    Halves halves;
    for (int i = 0; i < LANES; i++) halves[i] = to_half(floats[i]);
    return halves;
}
#endif

// The first `count` elements, zeros behind them.
template <class Element>
inline Floats load_first(const Element* from, int64_t count) {
    if (count >= LANES) return load_floats(from);
    Element padded[LANES] = {};
    memcpy(padded, from, count * sizeof(Element));
    return load_floats(padded);
}

// Of a number and NaN, the second.
inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }

// x between -limit and limit, or NaN.
inline Floats clamp(Floats x, float limit) {
    Floats lowest = broadcast(-limit);
    return -largest(lowest, -largest(lowest, x));
}

// What a state keeps of `dim` elements that it is given: those of another type are rounded, large magnitudes clamped.
constexpr float FLOAT16_MAX = 65504;
template <class Element>
inline void keep(const Element* from, int64_t dim, Element* to) {
    memcpy(to, from, dim * sizeof(Element));
}
inline void keep(const float* from, int64_t dim, Float16* to) {
    for (int64_t channel = 0; channel < dim; channel += LANES) {
        int64_t count = dim - channel < LANES ? dim - channel : LANES;
        Halves halves = to_halves(clamp(load_first(from + channel, count), FLOAT16_MAX));
        memcpy(to + channel, &halves, count * sizeof(Float16));
    }
}

// Elements as they would be read from what a state keeps of them.
template <class Element>
inline Floats as_kept(Floats elements, const Element*, const Element*) {
    return elements;
}
inline Floats as_kept(Floats elements, const float*, const Float16*) {
    Halves halves = to_halves(elements);
    return load_floats(reinterpret_cast<const Float16*>(&halves));
}

// Added and taken away again, it rounds numbers below 2 ** 22 to the nearest, ties to even.
constexpr float TO_NEAREST = 0x1.8p23f;

inline Ints to_nearest(Floats x) { return bits_of(x + TO_NEAREST) - bits_of(TO_NEAREST); }

// 2 ** x to float32's precision for x from -126 to 127; below, nearly zero. On [-1/2, 1/2] Taylor's series of
// exp(x ln 2), which is good to 1e-7 there.
inline Floats exp2(Floats x) {
    x = largest(broadcast(-126.0f), x);
    Floats shifted = x + TO_NEAREST;
    Floats rest = x - (shifted - TO_NEAREST);
    Floats power = rest * 1.5403530e-4f + 1.3333558e-3f;
    power = power * rest + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
    return floats_of(bits_of(power) + (bits_of(shifted) << 23));
}

// Lanes by their numbers in a, then in b. The two compilers have different names for it.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(mask_like(a)){__VA_ARGS__})
#endif
inline Bytes mask_like(Bytes bytes) { return bytes; }
inline Ints mask_like(Floats) { return Ints{}; }

inline Bytes interleave_low(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes interleave_high(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#if defined(__AVX512F__)
inline Floats interleave_low(Floats a, Floats b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Floats interleave_high(Floats a, Floats b) {
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX__)
inline Floats interleave_low(Floats a, Floats b) { return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Floats interleave_high(Floats a, Floats b) { return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline Floats interleave_low(Floats a, Floats b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
inline Floats interleave_high(Floats a, Floats b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// Each round joins lane i with lane i + LANES / 2.
template <class Join>
inline float reduce(Floats floats, Join join) {
    for (int joined = 1; joined < LANES; joined *= 2)
        floats = join(interleave_low(floats, floats), interleave_high(floats, floats));
    return floats[0];
}

inline float sum(Floats floats) {
    return reduce(floats, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats floats) {
    return reduce(floats, [](Floats a, Floats b) { return largest(a, b); });
}

// Transposes a square: as often as it takes, rows i and i + half are interleaved.
template <class Vector, int SIZE, class Element>
inline void transpose(const Element* from, int64_t from_stride, Element* to, int64_t to_stride) {
    Vector rows[SIZE], mixed[SIZE];
    for (int i = 0; i < SIZE; i++) rows[i] = load<Vector>(from + i * from_stride);
    for (int width = 1; width < SIZE; width *= 2) {
        for (int i = 0; i < SIZE / 2; i++) {
            mixed[2 * i] = interleave_low(rows[i], rows[i + SIZE / 2]);
            mixed[2 * i + 1] = interleave_high(rows[i], rows[i + SIZE / 2]);
        }
        for (int i = 0; i < SIZE; i++) rows[i] = mixed[i];
    }
    for (int i = 0; i < SIZE; i++) store(to + i * to_stride, rows[i]);
}

}  // namespace

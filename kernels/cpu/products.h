// Products of queries with keys, and of weights with values, for 32 tokens: dequantized, or codes as they are.

#pragma once

#include <type_traits>

#include "packing.h"

namespace {

// Queries whose sums are kept in registers together, and vectors of channels.
constexpr int QUERY_TILE = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_VECTORS = 4;  // there are 32 registers
#else
constexpr int MOST_VECTORS = 2;
#endif
// scores[i] = offsets[i] + q[i] . keys, for VECTORS * LANES tokens. keys: [dim][32]; q: [..][stride]; scores: [..][32].
template <int QUERIES, int VECTORS, class Code>
inline void score(const Code* keys, int64_t dim, const float* q, int64_t stride, const float* offsets, float* scores) {
    Floats sums[QUERIES][VECTORS];
    for (int i = 0; i < QUERIES; i++)
        for (int part = 0; part < VECTORS; part++) sums[i][part] = broadcast(offsets[i]);
    for (int64_t channel = 0; channel < dim; channel++) {
        Floats key[VECTORS];
        for (int part = 0; part < VECTORS; part++) key[part] = load_floats(keys + channel * BLOCK + part * LANES);
        for (int i = 0; i < QUERIES; i++)
            for (int part = 0; part < VECTORS; part++) sums[i][part] += q[i * stride + channel] * key[part];
    }
    for (int i = 0; i < QUERIES; i++)
        for (int part = 0; part < VECTORS; part++) store(scores + i * BLOCK + part * LANES, sums[i][part]);
}

// attended[i] = attended[i] * correction[i] + weights[i] . values, for VECTORS * LANES channels from this one on.
// weights: [..][32]; attended: [..][stride].
template <int QUERIES, int VECTORS, class Code>
inline void weigh(const Code* values, const ValueLayout& layout, int64_t channel, const float* weights,
                  const float* correction, float* attended, int64_t stride) {
    Floats sums[QUERIES][VECTORS] = {};
    const Code* places[VECTORS];
    for (int part = 0; part < VECTORS; part++) places[part] = values + layout.place(channel + part * LANES);
    for (int token = 0; token < BLOCK; token++) {
        Floats value[VECTORS];
        for (int part = 0; part < VECTORS; part++)
            value[part] = load_floats(places[part] + token * layout.token_stride);
        for (int i = 0; i < QUERIES; i++)
            for (int part = 0; part < VECTORS; part++) sums[i][part] += weights[i * BLOCK + token] * value[part];
    }
    for (int i = 0; i < QUERIES; i++) {
        for (int part = 0; part < VECTORS; part++) {
            float* place = attended + i * stride + channel + part * LANES;
            store(place, load_floats(place) * correction[i] + sums[i][part]);
        }
    }
}

// Calls use(number of queries, first query) for tiles of at most QUERY_TILE of them.
template <class Use>
inline void for_query_tiles(int64_t queries, Use use) {
    int64_t query = 0;
    for (; query + QUERY_TILE <= queries; query += QUERY_TILE) use(std::integral_constant<int, QUERY_TILE>(), query);
    switch (queries - query) {
        case 3: use(std::integral_constant<int, 3>(), query); break;
        case 2: use(std::integral_constant<int, 2>(), query); break;
        case 1: use(std::integral_constant<int, 1>(), query); break;
    }
}

// Calls use(vectors, first channel) for slices of at most MOST_VECTORS vectors of channels.
template <class Use>
inline void for_channel_slices(int64_t begin, int64_t end, Use use) {
    constexpr int MOST = MOST_VECTORS;
    for (; begin + (MOST - 1) * LANES < end; begin += MOST * LANES) use(std::integral_constant<int, MOST>(), begin);
    for (; begin + LANES < end; begin += 2 * LANES) use(std::integral_constant<int, 2>(), begin);
    if (begin < end) use(std::integral_constant<int, 1>(), begin);
}

// The same for any number of queries, and of tokens that is a multiple of LANES.
template <class Code>
void score_queries(const Code* keys, int64_t dim, const float* q, int64_t stride, int64_t queries, int64_t tokens,
                   const float* offsets, float* scores) {
    for_query_tiles(queries, [&](auto count, int64_t query) {
        constexpr int QUERIES = decltype(count)::value;
        const float *its_q = q + query * stride, *its_offsets = offsets + query;
        float* its_scores = scores + query * BLOCK;
        for (int64_t token = 0; token < tokens;) {
            if (token + 2 * LANES <= tokens) {
                score<QUERIES, 2>(keys + token, dim, its_q, stride, its_offsets, its_scores + token);
                token += 2 * LANES;
            } else {
                score<QUERIES, 1>(keys + token, dim, its_q, stride, its_offsets, its_scores + token);
                token += LANES;
            }
        }
    });
}

// The same for any number of queries, and the channels from begin to end.
template <class Code>
void weigh_queries(const Code* values, const ValueLayout& layout, int64_t begin, int64_t end, const float* weights,
                   int64_t queries, const float* correction, float* attended, int64_t stride) {
    for_query_tiles(queries, [&](auto count, int64_t query) {
        for_channel_slices(begin, end, [&](auto vectors, int64_t channel) {
            weigh<decltype(count)::value, decltype(vectors)::value>(values, layout, channel, weights + query * BLOCK,
                                                                    correction + query, attended + query * stride,
                                                                    stride);
        });
    });
}

}  // namespace

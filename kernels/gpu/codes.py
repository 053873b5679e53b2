"""Scores and averages from codes: packed blocks are attended to without making their elements, one by one warp.

An element is ``code * scale + zero_point``. Of keys the scale goes into the query, once for all tokens of a group:
``q . (code * scale + zero) = (q * scale) . code + q . zero``; of values into the weights, once for all channels of a
group. What is left to do for each element is to take its code out of the packed bytes, and there it is a number
already: in the mantissa of 128.0 it makes 128 + code. What that is too much is a product with a constant.

The bytes are loaded where tensor cores want their codes, so that no element moves between threads. Of an operand of
``mma.m16n8k16`` a thread holds neighbouring elements in pairs, the halves of a register, and which channel or token is
which of them is free as long as the other operand follows. So a pair is two bytes of a word (keys) or the bytes of two
neighbouring tokens (values), and one instruction takes the same field out of both.
"""

# What a kernel is given has no Python type: pointers, numbers and tensors of Triton's own.
# mypy: disable-error-code="no-untyped-def"
# Behind a return Triton compiles what is not in an else.
# ruff: noqa: RET505

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmix_compile.kernels.format.precision import BLOCK_EXTREMES_BYTES, BLOCK_TOKENS
from kvmix_compile.kernels.gpu.code_rows import OCTET, QUAD, WARP
from kvmix_compile.kernels.gpu.tiles import multiply
from kvmix_compile.kernels.gpu.unpack import load_once, once, small_to_float, to_float32, to_integers

# bfloat16's mantissa, and 128.0 in both halves of a word: a field at bit f of the mantissa makes 128 + field * 2**f.
MANTISSA_BITS = 7
OFFSET_BITS = 0x43004300
_OFFSET_BITS = tl.constexpr(OFFSET_BITS)
_OFFSET = tl.constexpr(-128.0)
_BOTH_HALVES = tl.constexpr(0x00010001)
_NIBBLE_LEVELS = tl.constexpr(15.0)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
_TOKENS = tl.constexpr(BLOCK_TOKENS)
_EXTREMES_BYTES = tl.constexpr(BLOCK_EXTREMES_BYTES)
_WARP = tl.constexpr(WARP)
_QUAD = tl.constexpr(QUAD)
_OCTET = tl.constexpr(OCTET)


@triton.constexpr_function
def element(constants, index):
    """constants[index], which Triton 3.6 would not take for a constant where it is handed to a function."""
    return constants[index]


@triton.constexpr_function
def pieces(values):
    """Of values: channels that are fields of the same bits, in the same stretch."""
    return values[0].slices * len(values)


@triton.constexpr_function
def groups_of_values(values):
    """Of a token."""
    return values[0].groups


@triton.constexpr_function
def columns_of_zero_points(values):
    """One for each group of a token, and as many as a tensor core gives at least."""
    return max(OCTET, triton.next_power_of_2(values[0].groups))


@triton.constexpr_function
def _width(values):
    return values[0].width


@triton.constexpr_function
def _metadata_byte(values):
    return values[0].metadata_byte


@triton.constexpr_function
def _bits(rows, index):
    return rows[index].bits


@triton.constexpr_function
def _bytes_of_keys(rows):
    """Of a token, for a thread."""
    return rows.width // QUAD


@triton.constexpr_function
def _bytes_of_values(rows):
    return rows.width // OCTET


@triton.constexpr_function
def _words_of_keys(rows):
    """Of a token, for a thread; less than a word counts as one."""
    return max(1, rows.width // QUAD // 4)


@triton.constexpr_function
def _bytes_in_half(rows):
    """Bytes of one token in each half of a word, of keys."""
    return 2 if rows.width // QUAD >= 4 else 1


@triton.constexpr_function
def _slices_in_half(rows):
    """Where a thread has one byte of a token, half of its fields go into each half of a word."""
    return rows.slices // 2 if rows.width // QUAD == 1 else rows.slices


@triton.constexpr_function
def _shift(position, bits):
    """By how much a field at this bit of a half is moved down into the mantissa. As few ways as there can be."""
    return position // _together(bits) * _together(bits)


@triton.constexpr_function
def _together(bits):
    """Neighbouring bits that are moved down together."""
    return MANTISSA_BITS // bits * bits


@triton.constexpr_function
def _field_assembly(bits, place):
    fields = 0x00010001 * ((2**bits - 1) << place)
    # 0xEA: (a & b) | c
    return f"lop3.b32 $0, $1, {fields:#x}, {OFFSET_BITS:#x}, 0xEA;"


@triton.jit
def _field(word, high, POSITION: tl.constexpr, ROWS: tl.constexpr):
    """The field at this bit of both halves of a word, 128 + field * 2**f as bfloat16: of the low half, of the high one.

    high: of 3 bits, the words of the high plane.
    """
    BITS: tl.constexpr = ROWS.field_bits
    SHIFT: tl.constexpr = _shift(POSITION, BITS)
    PLACE: tl.constexpr = POSITION - SHIFT
    pair = word >> SHIFT
    if _HAS_PTX:
        pair = tl.inline_asm_elementwise(
            _field_assembly(BITS, PLACE), "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = (pair & ((2**BITS - 1) << PLACE) * _BOTH_HALVES) | _OFFSET_BITS
    if ROWS.bits == 3:
        high = high << 2 if SHIFT == 0 else high >> (SHIFT - 2)
        pair |= high & (4 << PLACE) * _BOTH_HALVES
    low_half = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high_half = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low_half, high_half


@triton.jit
def _joined(tensors):
    """[.., n] of n tensors, a power of two of them, as many dimensions of two."""
    COUNT: tl.constexpr = len(tensors)
    if COUNT == 1:
        return tensors[0]
    else:
        pairs = tl.tuple([])
        for index in tl.static_range(COUNT // 2):
            pairs += (tl.join(tensors[index], tensors[index + COUNT // 2]),)
        return _joined(pairs)


@triton.jit
def _opaque(x):
    """x. The compiler looks back from a product to how the operands were joined, to hold them in another order; it does
    not look past side effects.
    """
    if not _HAS_PTX:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _words_at(first, UNIT: tl.constexpr):
    """A pointer to bytes, as one to what is loaded at once: 1, 2 or 4 bytes."""
    if UNIT == 4:
        return first.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        return first.to(tl.pointer_type(tl.uint16))
    else:
        return first


@triton.constexpr_function
def _unit(bytes):
    """Bytes that are loaded at once, where a thread has so many of a token."""
    return min(bytes, 4)


@triton.jit
def load_keys(block, KEYS: tl.constexpr, GROUP: tl.constexpr):
    """The bytes of a block of keys, for each of Rows and each group of tokens: words, those of the high plane, scales
    and zero points as stored.

    block: pointer to its first byte.
    """
    loaded = tl.tuple([])
    for index in tl.static_range(len(KEYS)):
        for group in tl.static_range(_TOKENS // GROUP):
            loaded += _load_rows_of_keys(block, group, element(KEYS, index), GROUP)
    return loaded


@triton.jit
def _load_rows_of_keys(block, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    words = _load_words_of_keys(block + ROWS.first_byte, ROWS.row_bytes, group, ROWS, GROUP)
    high = words
    if ROWS.bits == 3:
        high = _load_words_of_keys(block + ROWS.high_byte, ROWS.row_bytes // 2, group, ROWS, GROUP)
    place = tl.arange(0, ROWS.slices * ROWS.width)
    index = group * ROWS.groups + ROWS.first_group + place // ROWS.width * ROWS.row_bytes + place % ROWS.width
    first, second = _load_metadata(block + ROWS.metadata_byte, index, place % ROWS.width < ROWS.present, ROWS)
    return words, high, first, second


@triton.jit
def _load_words_of_keys(first, row_bytes, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """[tokens, threads along channels, words]"""
    UNIT: tl.constexpr = _unit(_bytes_of_keys(ROWS))
    WORDS: tl.constexpr = _words_of_keys(ROWS)
    token = group * GROUP + tl.arange(0, GROUP)[None, :, None]
    pointers = _words_at(first, UNIT) + token * (row_bytes // UNIT) + tl.arange(0, _QUAD * WORDS)[None, None, :]
    # No more is said of how they are aligned, so that a thread loads no words of others with its own; and the first
    # dimension keeps them apart from scales of the same shape, which would be laid out together with them.
    words = tl.load(tl.multiple_of(pointers, [UNIT, UNIT, UNIT * WORDS]))
    return words.reshape(GROUP, _QUAD, WORDS)


@triton.jit
def _load_metadata(metadata, index, exists, ROWS: tl.constexpr):
    """4 bits: what all groups share, then their bytes. 16 bits: scales, then zero points."""
    if ROWS.scale_bits == 4:
        extremes = tl.load(metadata.to(tl.pointer_type(tl.int64)))
        return extremes, _load_once(metadata + _EXTREMES_BYTES + index, exists)
    else:
        halves = metadata.to(tl.pointer_type(tl.float16))
        return _load_once(halves + index, exists), _load_once(halves + ROWS.all_groups + index, exists)


@triton.jit
def _load_once(pointers, mask):
    pointers, mask = tl.broadcast(pointers, mask)
    if pointers.numel >= _WARP:
        return tl.load(pointers, mask=mask, other=0)
    loaded = load_once(pointers.reshape(1, 1, pointers.numel), mask.reshape(1, 1, pointers.numel), _WARP)
    return loaded.reshape(pointers.shape)


@triton.jit
def _scale_and_zero_point(first, second, ROWS: tl.constexpr):
    """float32, of what _load_metadata gave."""
    if ROWS.scale_bits == 4:
        nibbles = to_integers(second)
        scale = tl.exp2(_from_nibble(first, nibbles & 15))
        return once(scale), once(_from_nibble(first >> 32, nibbles >> 4))
    else:
        return once(to_float32(first)), once(to_float32(second))


@triton.jit
def _from_nibble(extremes, nibble):
    lowest = (extremes & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    highest = ((extremes >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return small_to_float(nibble) * ((highest - lowest) * (1.0 / _NIBBLE_LEVELS)) + lowest


@triton.jit
def channels_of_keys(ROWS: tl.constexpr):
    """The head's channel at each place, slice by slice, and whether it is one: int32 and bool [places]."""
    place = tl.arange(0, ROWS.slices * ROWS.width)
    within = place % ROWS.width
    return ROWS.first_channel + place // ROWS.width * ROWS.row_bytes + within, within < ROWS.present


@triton.jit
def in_order_of_keys(x, ROWS: tl.constexpr):
    """[n, places] as channels_of_keys has them -> [n, places] as key_codes has them."""
    COUNT: tl.constexpr = x.shape[0]
    BYTES: tl.constexpr = _bytes_of_keys(ROWS)
    if BYTES == 1:
        # The upper half of the fields is the high half of a word.
        ordered = x.reshape(COUNT, 2, ROWS.slices // 2, _QUAD).permute(0, 2, 3, 1)
    elif BYTES == 2:
        ordered = x
    else:
        # [n, slices, threads, words, halves, bytes of a half]
        ordered = x.reshape(COUNT, ROWS.slices, _QUAD, _words_of_keys(ROWS), 2, 2).permute(0, 3, 5, 1, 2, 4)
    return ordered.reshape(x.shape)


@triton.jit
def _worth_of_keys(ROWS: tl.constexpr):
    """What the last digit of a code is worth, of a step of the scale, at each place as channels_of_keys has them."""
    place = tl.arange(0, ROWS.slices * ROWS.width)
    byte = place % 2 if _bytes_in_half(ROWS) == 2 else place * 0
    return _worth(byte, place // ROWS.width % _slices_in_half(ROWS), ROWS)


@triton.jit
def _worth(byte, slice_, ROWS: tl.constexpr):
    """As much as the field has not been moved down in the mantissa: float32."""
    TOGETHER: tl.constexpr = _together(ROWS.field_bits)
    bit = (byte * 8 + slice_ * ROWS.field_bits) % TOGETHER
    return tl.exp2(-bit.to(tl.float32))


@triton.jit
def key_codes(words, high, ROWS: tl.constexpr, FIELD: tl.constexpr):
    """128 + codes * 2**f, bfloat16 [places, tokens]. FIELD: which of a code's."""
    BYTES: tl.constexpr = _bytes_of_keys(ROWS)
    SLICES: tl.constexpr = _slices_in_half(ROWS)
    words = _in_halves(words, BYTES)
    high = _in_halves(high, BYTES) >> ROWS.high_shift
    low_halves = tl.tuple([])
    high_halves = tl.tuple([])
    for byte in tl.static_range(_bytes_in_half(ROWS)):
        for slice_ in tl.static_range(SLICES):
            pair = _field(words, high, byte * 8 + (slice_ + FIELD) * ROWS.field_bits, ROWS)
            low_halves += (pair[0],)
            high_halves += (pair[1],)
    codes = _opaque(tl.join(_joined(low_halves), _joined(high_halves)))
    TOKENS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[2]
    codes = codes.reshape(TOKENS, _QUAD, WORDS, _bytes_in_half(ROWS) * SLICES, 2)
    return codes.permute(2, 3, 1, 4, 0).reshape(ROWS.width * ROWS.slices, TOKENS)


@triton.jit
def _in_halves(words, BYTES: tl.constexpr):
    words = words.to(tl.int32)
    if BYTES == 1:
        return words | words << 12
    elif BYTES == 2:
        return words & 0xFF | (words & 0xFF00) << 8
    else:
        return words


@triton.jit
def scores_of_keys(loaded, queries, KEYS: tl.constexpr, GROUP: tl.constexpr):
    """float32 [queries, 32], of what load_keys gave. queries: for each of Rows bfloat16 [queries, places]."""
    groups = tl.tuple([])
    for group in tl.static_range(_TOKENS // GROUP):
        groups += (_scores_of_group(loaded, queries, group, KEYS, GROUP),)
    return _side_by_side(groups)


@triton.jit
def _part(loaded, NUMBER: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Of four tensors for each of Rows, some of those of one."""
    part = tl.tuple([])
    for index in tl.static_range(COUNT):
        part += (loaded[4 * NUMBER + FIRST + index],)
    return part


@triton.jit
def _scores_of_group(loaded, queries, NUMBER: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr):
    PER_BLOCK: tl.constexpr = _TOKENS // GROUP
    # What all tokens of the group have in common: zero points, and what the codes are too much.
    common = tl.zeros([queries[0].shape[0], _OCTET], tl.float32)
    folded = tl.tuple([])
    for index in tl.static_range(len(KEYS)):
        first, second = _part(loaded, index * PER_BLOCK + NUMBER, 2, 2)
        scale, zero_point = _scale_and_zero_point(first, second, element(KEYS, index))
        zero_point = in_order_of_keys(zero_point.to(tl.bfloat16)[None, :], element(KEYS, index))
        common = multiply(queries[index], _broadcast(zero_point), common)
        scale = (scale * _worth_of_keys(element(KEYS, index))).to(tl.bfloat16)
        folded += (_product(queries[index], in_order_of_keys(scale[None, :], element(KEYS, index))),)
        common = multiply(folded[index], _constant(folded[index], element(KEYS, index)), common)
    scores = replicated(common, GROUP)
    for index in tl.static_range(len(KEYS)):
        words, high = _part(loaded, index * PER_BLOCK + NUMBER, 0, 2)
        scores = multiply(folded[index], key_codes(words, high, element(KEYS, index), 0), scores)
        if _bits(KEYS, index) == 8:
            higher = _product(folded[index], tl.full([1, 1], 16.0, tl.float32).to(tl.bfloat16))
            scores = multiply(higher, key_codes(words, high, element(KEYS, index), 1), scores)
    return scores


@triton.jit
def _product(a, b):
    """Of bfloat16, two at a time; the interpreter would take its bits for integers."""
    if _INTERPRETED:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)
    else:
        return a * b


@triton.jit
def _broadcast(x):
    """[1, n] -> [n, 8]"""
    return x.trans().broadcast_to(x.shape[1], _OCTET)


@triton.jit
def _constant(folded, ROWS: tl.constexpr):
    """What folded queries or weights are multiplied by for what codes are too much."""
    VALUE: tl.constexpr = _OFFSET * (17 if ROWS.bits == 8 else 1)
    return tl.full([folded.shape[1], _OCTET], VALUE, tl.float32).to(tl.bfloat16)


@triton.jit
def replicated(x, COLUMNS: tl.constexpr):
    """[queries, n] -> [queries, columns], the same n columns again and again, each in the thread that has it."""
    if x.shape[1] == COLUMNS:
        return x
    else:
        return replicated(_beside(x, x), COLUMNS)


@triton.jit
def _beside(left, right):
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _side_by_side(tensors):
    COUNT: tl.constexpr = len(tensors)
    if COUNT == 1:
        return tensors[0]
    else:
        pairs = tl.tuple([])
        for index in tl.static_range(COUNT // 2):
            pairs += (_beside(tensors[2 * index], tensors[2 * index + 1]),)
        return _side_by_side(pairs)


@triton.jit
def load_values(block, VALUES: tl.constexpr):
    """The bytes of a block of values: for each of Rows those of even and odd tokens, the same of the high plane, and
    last scales and zero points as stored.
    """
    loaded = tl.tuple([])
    for index in tl.static_range(len(VALUES)):
        loaded += _load_rows_of_values(block, element(VALUES, index))
    GROUPS: tl.constexpr = groups_of_values(VALUES)
    group = tl.arange(0, _padded(GROUPS))[None, :]
    index = tl.arange(0, _TOKENS)[:, None] * GROUPS + group
    metadata = block + _metadata_byte(VALUES)
    return loaded + _load_metadata(metadata, index, group < GROUPS, element(VALUES, 0))


@triton.constexpr_function
def _padded(number):
    return triton.next_power_of_2(number)


@triton.jit
def _load_rows_of_values(block, ROWS: tl.constexpr):
    even, odd = _load_words_of_values(block + ROWS.first_byte, ROWS.row_bytes, ROWS)
    if ROWS.bits != 3:
        return even, odd, even, odd
    else:
        high_even, high_odd = _load_words_of_values(block + ROWS.high_byte, ROWS.row_bytes // 2, ROWS)
        return even, odd, high_even, high_odd


@triton.jit
def _load_words_of_values(first, row_bytes: tl.constexpr, ROWS: tl.constexpr):
    """Of even and odd tokens [eights of tokens, threads along channels, threads along pairs of tokens]."""
    UNIT: tl.constexpr = _unit(_bytes_of_values(ROWS))
    token = tl.arange(0, _TOKENS // 8)[:, None, None] * 8 + tl.arange(0, _QUAD)[None, None, :] * 2
    pointers = _words_at(first, UNIT) + token * (row_bytes // UNIT) + tl.arange(0, _OCTET)[None, :, None]
    # Threads are laid out by what is contiguous: along the last dimension first, though it is not. As what is said of
    # alignment leaves one word for each thread, nothing else comes of it.
    even = tl.multiple_of(tl.max_contiguous(pointers, [1, 2, 4]), [UNIT, UNIT, UNIT])
    odd = tl.multiple_of(tl.max_contiguous(pointers + row_bytes // UNIT, [1, 2, 4]), [UNIT, UNIT, UNIT])
    return tl.load(even), tl.load(odd)


@triton.jit
def channels_of_values(ROWS: tl.constexpr, SLICE: tl.constexpr):
    """The head's channels that are a piece: int32 [width]."""
    return ROWS.first_channel + SLICE * ROWS.row_bytes + tl.arange(0, ROWS.width)


@triton.jit
def in_order_of_values(x, ROWS: tl.constexpr):
    """[n, width] as channels_of_values has them -> [n, width] as value_codes has them."""
    return x.reshape(x.shape[0], _OCTET, _bytes_of_values(ROWS)).permute(0, 2, 1).reshape(x.shape)


@triton.jit
def in_order_of_channels(x, ROWS: tl.constexpr):
    """The other way."""
    return x.reshape(x.shape[0], _bytes_of_values(ROWS), _OCTET).permute(0, 2, 1).reshape(x.shape)


@triton.jit
def value_codes(even, odd, high_even, high_odd, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """128 + codes * 2**f, bfloat16 [32, width]."""
    BYTES: tl.constexpr = _bytes_of_values(ROWS)
    low_halves = tl.tuple([])
    high_halves = tl.tuple([])
    for byte in tl.static_range(BYTES):
        words = _of_two_tokens(even, odd, byte // 2)
        high = _of_two_tokens(high_even, high_odd, byte // 2) >> ROWS.high_shift
        pair = _field(words, high, byte % 2 * 8 + SLICE * ROWS.field_bits, ROWS)
        low_halves += (pair[0],)
        high_halves += (pair[1],)
    codes = _opaque(tl.join(_joined(low_halves), _joined(high_halves)))
    codes = codes.reshape(_TOKENS // 8, _OCTET, _QUAD, BYTES, 2)
    return codes.permute(0, 2, 4, 3, 1).reshape(_TOKENS, ROWS.width)


@triton.jit
def _of_two_tokens(even, odd, HALF: tl.constexpr):
    """Bytes 2 * HALF and behind it: of the even token in the low half of a word, of the odd one in the high half."""
    if HALF == 0:
        return (even.to(tl.int32) & 0xFFFF) | odd.to(tl.int32) << 16
    else:
        return (even >> 16 & 0xFFFF) | (odd >> 16) << 16


@triton.jit
def nothing_attended(QUERIES: tl.constexpr, VALUES: tl.constexpr):
    """Zeros: for each piece float32 [queries, width]."""
    attended = tl.tuple([])
    for _piece in tl.static_range(pieces(VALUES)):
        attended += (tl.zeros([QUERIES, _width(VALUES)], tl.float32),)
    return attended


@triton.jit
def add_values(loaded, weights, attended, zero_points, correction, VALUES: tl.constexpr):
    """Adds weighted values to sums that are multiplied by `correction` [queries].

    loaded: of load_values. weights: bfloat16 [queries, 32]. attended: for each piece float32 [queries, width], in units
    of 2**-f. zero_points: float32 [queries, groups or more], weighted zero points, that have still to be added.
    """
    COUNT: tl.constexpr = len(VALUES)
    scale, zero_point = _scale_and_zero_point(loaded[4 * COUNT], loaded[4 * COUNT + 1], element(VALUES, 0))
    zero_points = multiply(weights, _widened(zero_point.to(tl.bfloat16)), zero_points * correction[:, None])
    scales = _columns(scale.to(tl.bfloat16))
    folded = tl.tuple([])
    offsets = tl.tuple([])
    for group in tl.static_range(groups_of_values(VALUES)):
        folded += (_product(weights, scales[group][None, :]),)
        none = tl.zeros([weights.shape[0], _OCTET], tl.float32)
        offset = multiply(folded[group], _constant(folded[group], element(VALUES, 0)), none)
        offsets += (replicated(offset, _width(VALUES)),)
    added = tl.tuple([])
    for piece in tl.static_range(pieces(VALUES)):
        even, odd, high_even, high_odd = _part(loaded, piece % COUNT, 0, 4)
        codes = value_codes(even, odd, high_even, high_odd, element(VALUES, piece % COUNT), piece // COUNT)
        so_far = attended[piece] * correction[:, None] + offsets[_group_of(VALUES, piece)]
        added += (multiply(folded[_group_of(VALUES, piece)], codes, so_far),)
    return added, zero_points


@triton.constexpr_function
def _group_of(values, piece):
    slice_, index = divmod(piece, len(values))
    rows = values[index]
    return (rows.first_channel + slice_ * rows.row_bytes) * rows.groups // (rows.slices * rows.row_bytes)


@triton.jit
def _widened(x):
    """[tokens, groups] -> at least 8 columns, the same ones again."""
    if x.shape[1] >= _OCTET:
        return x
    else:
        TIMES: tl.constexpr = _OCTET // x.shape[1]
        return x[:, None, :].broadcast_to(x.shape[0], TIMES, x.shape[1]).reshape(x.shape[0], _OCTET)


@triton.jit
def _columns(x):
    """Of [n, columns], each column."""
    COLUMNS: tl.constexpr = x.shape[1]
    if COLUMNS == 1:
        return (x.reshape(x.shape[0]),)
    else:
        left, right = tl.split(x.reshape(x.shape[0], 2, COLUMNS // 2).permute(0, 2, 1))
        return _columns(left) + _columns(right)


@triton.jit
def in_whole_units(attended, zero_points, VALUES: tl.constexpr):
    """What add_values added up, zero points included: for each piece float32 [queries, width]."""
    COUNT: tl.constexpr = len(VALUES)
    whole = tl.tuple([])
    for piece in tl.static_range(pieces(VALUES)):
        column = tl.arange(0, zero_points.shape[1])[None, :] == _group_of(VALUES, piece)
        zero_point = tl.sum(tl.where(column, zero_points, 0.0), 1)
        worth = _worth_of_values(element(VALUES, piece % COUNT), piece // COUNT)
        whole += (attended[piece] * worth[None, :] + zero_point[:, None],)
    return whole


@triton.jit
def _worth_of_values(ROWS: tl.constexpr, SLICE: tl.constexpr):
    """As _worth_of_keys, as value_codes has them."""
    byte = tl.arange(0, ROWS.width) // _OCTET
    return _worth(byte % 2, byte * 0 + SLICE, ROWS)

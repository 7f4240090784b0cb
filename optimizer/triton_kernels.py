"""The engine's kernels for CUDA devices, in Triton: one program a block, or a row of a body. Compiled on first use.

A block is 4,096 values, which a program of 256 threads holds 16 to a thread. Values of tensors are found by PIECE
records (`geometry`) in device memory: `pieces`, ten int32 each, is the same memory as `longs`, five int64 each; those
of block b are firsts[b] to firsts[b + 1]. Tensors are named by address (int64), 0 for one that is missing.

Bits are those of `PlainEngine`: butterflies by ascending strides, every product and sum rounded by itself. Launch all
of them with `enable_fp_fusion=False`; `triton_engine` does. Traffic is device memory in bytes per parameter, of whole
blocks, K coefficients sent of each; it is what bounds these kernels where shared memory and arithmetic do not.

TOPK, LOW, BITMAP, BYTES are `layout.BlockCode`; bitmaps are read CHUNK bits at a time, of ROWS rows at once. WIDE:
places within a tile need 64 bits.
"""

import triton
import triton.language as tl

FP32, BF16, FP16 = 0, 1, 2
"""Types of tensors, as `kinds` name them."""


@triton.jit
def _sixteen(x):
    """Butterflies with strides 1, 2, 4, 8 within the rows of (256, 16): each makes the lowest bit of the column's
    number the highest, so after four all are in place. The compiler gives most of a row to one thread."""
    for _ in tl.static_range(4):
        a, b = tl.split(tl.reshape(x, (256, 8, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (256, 16))
    return x


@triton.jit
def butterflies(x):
    """(4096,) of any signed type, strides 1 to 2048: three times sixteen at once, then on to the next four bits."""
    x = tl.reshape(x, (256, 16))
    for _ in tl.static_range(3):
        x = tl.reshape(tl.permute(_sixteen(x), (1, 0)), (256, 16))
    return tl.reshape(x, (4096,))


@triton.jit
def _elements(pieces, longs, p, i, WIDE: tl.constexpr):
    """Of piece p: its tensor's number, where in it the piece begins, where from there value i of the block is, and
    whether it is."""
    tensor, offset = tl.load(pieces + 10 * p), tl.load(pieces + 10 * p + 2)
    rows, cols = tl.load(pieces + 10 * p + 3), tl.load(pieces + 10 * p + 4)
    start, stride = tl.load(longs + 5 * p + 3), tl.load(longs + 5 * p + 4)
    if not WIDE:
        stride = stride.to(tl.int32)
    if (rows == 64) & (cols == 64):
        at = (i >> 6) * stride + (i & 63)
        inside = i >= 0
    else:
        one = rows == 1
        row = tl.where(one, 0, (i >> 6) - (offset >> 6))
        col = tl.where(one, i - offset, (i & 63) - (offset & 63))
        at = row * stride + col
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return tensor, start, at, inside


@triton.jit
def _gathered(pieces, longs, firsts, addresses, kinds, block, i, WIDE: tl.constexpr):
    """Values i of a block in fp32, 0 where no tensor has one."""
    x = tl.zeros((4096,), tl.float32)
    for p in range(tl.load(firsts + block), tl.load(firsts + block + 1)):
        tensor, start, at, inside = _elements(pieces, longs, p, i, WIDE)
        address, kind = tl.load(addresses + tensor), tl.load(kinds + tensor)
        inside = inside & (address != 0)
        if kind == 0:
            x = tl.load(address.to(tl.pointer_type(tl.float32)) + start + at, inside, x)
        elif kind == 1:
            y = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + start + at, inside, 0.0).to(tl.float32)
            x = tl.where(inside, y, x)
        else:
            y = tl.load(address.to(tl.pointer_type(tl.float16)) + start + at, inside, 0.0).to(tl.float32)
            x = tl.where(inside, y, x)
    return x


@triton.jit
def _bits(rows, at, wanted, LOW: tl.constexpr, BYTES: tl.constexpr):
    """LOW <= 12 bits of a row's code from bit `at` on, where wanted."""
    byte = at >> 3
    first = tl.load(rows + byte, wanted & (byte < BYTES), 0).to(tl.int32)
    second = tl.load(rows + byte + 1, wanted & (byte + 1 < BYTES), 0).to(tl.int32)
    third = tl.load(rows + byte + 2, wanted & (byte + 2 < BYTES), 0).to(tl.int32)
    return ((first | (second << 8) | (third << 16)) >> (at & 7)) & ((1 << LOW) - 1)


@triton.jit
def _bit(rows, at, wanted):
    """Bit `at` of a row's code, 0 where not wanted."""
    return (tl.load(rows + (at >> 3), wanted, 0).to(tl.int32) >> (at & 7)) & 1


@triton.jit
def _votes(rows, real, j, before, TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr):
    """Of bits j (1, CHUNK) of the bitmaps of valid rows (ROWS, 1), `before` of which were set earlier: whether each is
    a vote, its index and sign bit (ROWS, CHUNK); how many were set until now (ROWS, 1)."""
    present = _bit(rows, TOPK * LOW + j, real & (j < BITMAP))
    rank = before + tl.cumsum(present, 1) - 1
    there = present == 1
    index = ((j - rank) << LOW) | _bits(rows, rank * LOW, there, LOW, BYTES)
    negative = _bit(rows, TOPK * LOW + BITMAP + rank, there)
    return there, index, negative == 1, before + tl.sum(present, 1, keep_dims=True)


@triton.jit
def _mean(x, TOPK: tl.constexpr, HALVINGS: tl.constexpr):
    """Mean of TOPK values padded with zeros: the upper half is added to the lower, again and again."""
    for _ in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    total = tl.sum(x, 0)
    # Of a power of two the product with the reciprocal is the quotient, without a slow division.
    return total * (1.0 / TOPK) if (TOPK & (TOPK - 1)) == 0 else tl.div_rn(total, TOPK * 1.0)


@triton.jit(do_not_specialize=["salt", "first"])
def encode_kernel(
    pieces, longs, firsts, addresses, kinds, momentum, decay, rate, salt, first, indices, words, scale, energy,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, HALVINGS: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Momentum = decay * momentum + rate * coefficients; of the TOPK largest of each block: the code, in WORDS zeroed
    int32, and the mean magnitude, by which they move towards zero; energy: sums of squares, of all and of those.
    `indices` (blocks, TOPK) int16 is scratch.

    Traffic: the gradient once (4, or 2 in 16 bits), momentum read and written (8): 12; outputs 0.03 at K = 32.
    """
    n = tl.program_id(0)
    block = first + n
    i = tl.arange(0, 4096)
    held = momentum + block.to(tl.int64) * 4096
    x = _gathered(pieces, longs, firsts, addresses, kinds, block, i, WIDE)
    m = decay * tl.load(held + i) + rate * butterflies(x)
    tl.store(held + i, m)
    # Bits of magnitudes order as integers. At least TOPK are `least` or more, fewer are `above` or more; the search
    # ends early when it happens on a bound that TOPK reach. An octave below the largest is probed first, then more.
    bits = m.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    least = 0
    above = tl.max(bits, 0) + 1
    reached = 4096
    step = 1 << 23
    while (above - least > 1) & (reached != TOPK):
        probe = tl.maximum(least + (above - least) // 2, above - step)
        count = tl.sum((bits >= probe).to(tl.int32), 0)
        enough = count >= TOPK
        least = tl.where(enough, probe, least)
        reached = tl.where(enough, count, reached)
        above = tl.where(enough, above, probe)
        step = tl.minimum(step, 1 << 29) * 2
    more, tied = (bits > least).to(tl.int32), (bits == least).to(tl.int32)
    # Both ranks in one scan, of runs of 16 values and then of the runs: larger ones in the low half of a word, ties in
    # the high half.
    runs = tl.reshape(more | (tied << 16), (256, 16))
    sums = tl.sum(runs, 1)
    ranks = tl.reshape(tl.cumsum(runs, 1) + (tl.cumsum(sums, 0) - sums)[:, None], (4096,))
    ties, room = ranks >> 16, TOPK - (tl.sum(sums, 0) & 0xFFFF)
    kept = (more == 1) | ((tied == 1) & (ties <= room))
    listed = indices + n * TOPK
    tl.store(listed + ((ranks & 0xFFFF) + tl.minimum(ties, room) - 1), i.to(tl.int16), kept)
    tl.debug_barrier()  # what other threads have stored is read from here on
    k = tl.arange(0, 1 << HALVINGS)
    real = k < TOPK
    index = tl.load(listed + k, real, 0).to(tl.int32)
    value = tl.load(held + index, real, 0.0)
    # The sign of a zero is by the lowest bit of index + salt.
    negative = (value < 0) | ((value == 0) & (((index + salt) & 1) == 1))
    mean = _mean(tl.abs(value), TOPK, HALVINGS)
    tl.store(scale + block, mean)
    tl.store(energy + 2 * n, tl.sum(m * m, 0))
    tl.store(energy + 2 * n + 1, tl.sum(value * value, 0))
    tl.debug_barrier()  # no thread that holds a copy of `value` is still to read it
    tl.store(held + index, value + tl.where(negative, mean, -mean), real)
    row = words + n * WORDS
    low, at = index & ((1 << LOW) - 1), k * LOW
    tl.atomic_or(row + (at >> 5), low << (at & 31), real, sem="relaxed")
    across = real & ((at & 31) + LOW > 32)
    tl.atomic_or(row + (at >> 5) + 1, low >> (32 - (at & 31)), across, sem="relaxed")
    at = TOPK * LOW + (index >> LOW) + k
    tl.atomic_or(row + (at >> 5), 1 << (at & 31), real, sem="relaxed")
    at = TOPK * LOW + BITMAP + k
    tl.atomic_or(row + (at >> 5), 1 << (at & 31), real & negative, sem="relaxed")


@triton.jit(do_not_specialize=["factor", "first"])
def add_kernel(
    bodies, scale, momentum, factor, first,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """momentum[index] += sign * (scale * factor), for the rows of one body that begin with block `first`.

    Traffic: a sector of 32 bytes read and written for each coefficient: K / 64, 0.5 at K = 32.
    """
    n = tl.program_id(0)
    rows = bodies + n.to(tl.int64) * BYTES
    held = momentum + (first + n).to(tl.int64) * 4096
    amount = tl.load(scale + first + n) * factor
    before = tl.zeros((1, 1), tl.int32)
    for start in range(0, BITMAP, CHUNK):
        j = start + tl.arange(0, CHUNK)[None, :]
        there, index, negative, before = _votes(rows, j >= 0, j, before, TOPK, LOW, BITMAP, BYTES)
        value = tl.load(held + index, there, 0.0)
        tl.debug_barrier()
        tl.store(held + index, value + tl.where(negative, -amount, amount), there)


@triton.jit
def _followed(
    trend, bodies, tally, n, count, members, bound, window,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`trend.follow` of a block's trend (4096,) int32 and H V H of its votes: those in row n of `members` bodies
    (members, count, BYTES), clipped to +-bound.

    `tally` (2048,) int32, zero before and after, is where they are added up, two in a word: the sum of votes on an even
    index, and 65536 times that on the odd one behind it. It stays in the L2 cache.
    """
    for member in range(0, members, ROWS):
        member_R1 = member + tl.arange(0, ROWS)[:, None]
        rows = bodies + (member_R1.to(tl.int64) * count + n) * BYTES
        before = tl.zeros((ROWS, 1), tl.int32)
        for start in range(0, BITMAP, CHUNK):
            j = start + tl.arange(0, CHUNK)[None, :]
            there, index, negative, before = _votes(rows, member_R1 < members, j, before, TOPK, LOW, BITMAP, BYTES)
            vote = tl.where(negative, -1, 1) << (16 * (index & 1))
            tl.atomic_add(tally + (index >> 1), vote, there, sem="relaxed")
    tl.debug_barrier()  # from here on all threads' votes are counted
    w = tl.arange(0, 2048)
    pair = tl.load(tally + w, cache_modifier=".cg")
    tl.debug_barrier()  # and read
    tl.store(tally + w, tl.zeros((2048,), tl.int32))
    tl.debug_barrier()  # and zero
    even = (pair << 16) >> 16
    votes = tl.reshape(tl.join(even, (pair - even) >> 16), (4096,))
    changes = butterflies(tl.minimum(tl.maximum(votes, -bound), bound))
    sign = trend >> 31
    leak = (((trend ^ sign) - sign) + ((1 << window) - 1)) >> window
    moved = trend - ((leak ^ sign) - sign) + (changes << 3)
    return tl.minimum(tl.maximum(moved, -32767), 32767)


@triton.jit(do_not_specialize=["first", "count", "members", "bound", "window"])
def apply_kernel(
    pieces, longs, firsts, weights, rates, shares, trend, bodies, tally, first, count, members, bound, window,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The trend follows the votes; weight = weight * share - rate * sign(trend). Programs take turns at the blocks.

    Traffic: weights (8) and trend (4), read and written: 12; bodies BYTES / 4096 for each member, 0.01 at K = 32.
    """
    i = tl.arange(0, 4096)
    mine = tally + tl.program_id(0) * 2048
    for n in tl.range(tl.program_id(0), count, tl.num_programs(0), disable_licm=True):
        block = first + n
        held = trend + block.to(tl.int64) * 4096 + i
        way = _followed(
            tl.load(held).to(tl.int32), bodies, mine, n, count, members, bound, window,
            TOPK, LOW, BITMAP, BYTES, CHUNK, ROWS,
        )  # fmt: skip
        tl.store(held, way.to(tl.int16))
        for p in range(tl.load(firsts + block), tl.load(firsts + block + 1)):
            tensor, start, at, inside = _elements(pieces, longs, p, i, WIDE)
            weight = tl.load(weights + tensor).to(tl.pointer_type(tl.float32)) + start
            rate = tl.load(rates + tensor)
            step = tl.where(way > 0, rate, tl.where(way < 0, -rate, 0.0))
            tl.store(weight + at, tl.load(weight + at, inside, 0.0) * tl.load(shares + tensor) - step, inside)


@triton.jit(do_not_specialize=["first", "count", "members", "bound", "window"])
def ahead_kernel(
    pieces, longs, firsts, weights, addresses, kinds, rates, trend, bodies, tally, first, count, members, bound, window,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """target = weight - rate * sign(trend as it would follow the votes), rounded to the target's type.

    Traffic: trend (2), weights (4), targets (4, or 2 in 16 bits): 10.
    """
    i = tl.arange(0, 4096)
    mine = tally + tl.program_id(0) * 2048
    for n in tl.range(tl.program_id(0), count, tl.num_programs(0), disable_licm=True):
        block = first + n
        way = _followed(
            tl.load(trend + block.to(tl.int64) * 4096 + i).to(tl.int32), bodies, mine, n, count, members, bound, window,
            TOPK, LOW, BITMAP, BYTES, CHUNK, ROWS,
        )  # fmt: skip
        for p in range(tl.load(firsts + block), tl.load(firsts + block + 1)):
            tensor, start, at, inside = _elements(pieces, longs, p, i, WIDE)
            rate = tl.load(rates + tensor)
            step = tl.where(way > 0, rate, tl.where(way < 0, -rate, 0.0))
            weight = tl.load(weights + tensor).to(tl.pointer_type(tl.float32)) + start
            moved = tl.load(weight + at, inside, 0.0) - step
            kind, address = tl.load(kinds + tensor), tl.load(addresses + tensor)
            if kind == 0:
                tl.store(address.to(tl.pointer_type(tl.float32)) + start + at, moved, inside)
            elif kind == 1:
                # To the nearest, ties to even, by hand: Triton's interpreter would cut off.
                bits = moved.to(tl.int32, bitcast=True)
                nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                tl.store(address.to(tl.pointer_type(tl.int16)) + start + at, nearest.to(tl.int16), inside)
            else:
                tl.store(address.to(tl.pointer_type(tl.float16)) + start + at, moved.to(tl.float16), inside)


@triton.jit
def check_kernel(
    bodies, wrong,
    TOPK: tl.constexpr, LOW: tl.constexpr, BITMAP: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """wrong[n]: not 0 if row n is not what `codec.encode_blocks` makes of some indices and signs.

    Indices ascend if the low bits do wherever two bits of the map follow each other. Traffic: the bodies.
    """
    n = tl.program_id(0)
    row = bodies + n.to(tl.int64) * BYTES
    before = 0
    bad = 0
    for start in range(0, BITMAP, CHUNK):
        j = start + tl.arange(0, CHUNK)
        present = _bit(row, TOPK * LOW + j, j < BITMAP)
        follows = (present & _bit(row, TOPK * LOW + j - 1, (j > 0) & (j < BITMAP))) == 1
        rank = before + tl.cumsum(present, 0) - 1
        falls = _bits(row, rank * LOW, follows, LOW, BYTES) <= _bits(row, (rank - 1) * LOW, follows, LOW, BYTES)
        beyond = j - rank >= (4096 >> LOW)
        bad += tl.sum((((present == 1) & beyond) | (follows & falls)).to(tl.int32), 0)
        before += tl.sum(present, 0)
    used: tl.constexpr = (TOPK * LOW + BITMAP + TOPK) % 8
    if used != 0:
        bad += tl.load(row + BYTES - 1).to(tl.int32) >> used
    tl.store(wrong + n, bad + tl.where(before == TOPK, 0, 1))


@triton.jit(do_not_specialize=["first"])
def fingerprint_kernel(pieces, longs, firsts, weights, within, of_blocks, first, sums, WIDE: tl.constexpr):
    """sums[n] = K_b * (sum of R_j * bits of value j), modulo 2^64, of block b = first + n.

    Traffic: weights (4); the factors R stay in caches.
    """
    n = tl.program_id(0)
    block = first + n
    i = tl.arange(0, 4096)
    bits = tl.zeros((4096,), tl.int32)
    for p in range(tl.load(firsts + block), tl.load(firsts + block + 1)):
        tensor, start, at, inside = _elements(pieces, longs, p, i, WIDE)
        address = tl.load(weights + tensor)
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + start + at, inside & (address != 0), bits)
    total = tl.sum((bits.to(tl.int64) & 0xFFFFFFFF) * tl.load(within + i), 0)
    tl.store(sums + n, total * tl.load(of_blocks + block))

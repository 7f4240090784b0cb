/* One function per operation, compiled twice: for the virtual machine by the project's toolchain, and for this computer.
 * Both must give the same 64 bits for the same input. The program's own headers are included, so that its arithmetic is
 * checked as it stands. arithmetic_check.py reads the names below, in this order. */
#include "counter.h"
#include "random.h"

typedef unsigned short u16;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;

#define NOINLINE __attribute__((noinline))

/* Arguments and results that are narrower than a register, over a real call. */
static NOINLINE u32 add_over_call(u32 a, u32 b) { return a + b; }
static NOINLINE u16 mix_over_call(u16 a, u8 b, u32 c) { return (u16)(a * b - c); }
static NOINLINE s32 negate_over_call(s32 a) { return (s32)(0u - (u32)a); }

struct mixed {
    u8 byte;
    u32 word;
    u64 wide;
    u16 half;
} __attribute__((packed));

/* Fields that are not aligned, of every width, written and read again. */
static NOINLINE u64 through_memory(struct round *scratch, u64 a, u64 b, u64 c) {
    struct mixed *m = (struct mixed *)scratch;
    m->byte = (u8)a;
    m->word = (u32)b;
    m->wide = c;
    m->half = (u16)(a + b);
    m->word += m->byte;
    m->half -= (u16)m->word;
    m->wide ^= (u64)m->word << 32 | m->half;
    return m->wide + m->byte;
}

/* Fields as instructions keep them: counted up, subtracted from, compared. */
static NOINLINE u64 counters(struct round *scratch, u64 a, u64 b) {
    scratch->expected_count = (u32)a;
    scratch->committed_count = (u32)b;
    scratch->witness_count = (u8)a;
    scratch->expected_count--;
    scratch->committed_count++;
    scratch->witness_count++;
    u64 behind = scratch->expected_count - scratch->committed_count;
    return behind << 8 ^ scratch->witness_count ^ (u64)(scratch->committed_count >= scratch->expected_count) << 63;
}

/* Random attestations are added one by one; then some thresholds are asked for. */
static NOINLINE u64 quorum(struct round *scratch, u64 a, u64 b, u64 c) {
    u64 state = a, folded = 0;
    for (u64 p = 0; p < COUNTER_PLANES; p++) scratch->counter[p] = (bitmap){{0, 0, 0, 0}};
    for (u64 i = 0; i < (b & 31) + 1; i++) {
        bitmap said = {{draw(&state), draw(&state) | draw(&state), draw(&state) & a, b}};
        count_bitmap(scratch, &said);
    }
    for (u64 n = c & 7; n < 34; n += 8)
        for (u64 w = 0; w < 4; w++) folded = (folded << 7 | folded >> 57) ^ counts_at_least(scratch, w, n);
    return folded;
}

/* The slices of a round, as assign.c cuts them. */
static NOINLINE u64 slices(u64 a, u64 b, u64 c) {
    u64 members = (c & 31) + 1, state = a, total = 0, cumulative = 0, offset = 0, folded = 0;
    u64 positions = b % MAX_BATCH + 1;
    for (u64 i = 0; i < members; i++) total += draw(&state) % MAX_SHARE + 1;
    state = a;
    for (u64 i = 0; i < members; i++) {
        cumulative += draw(&state) % MAX_SHARE + 1;
        u64 end = positions * cumulative / total;
        folded = folded * 31 + (u32)(end - offset);
        offset = end;
    }
    return folded ^ offset;
}

/* Bits set, cleared and walked. */
static NOINLINE u64 bits(u64 a, u64 b, u64 c) {
    bitmap map = {{a, b, c, a ^ b}};
    set_bit(&map, a & 255);
    clear_bit(&map, b & 255);
    u64 folded = (u64)has_bit(&map, c & 255);
    for_each (slot, &map) folded = folded * 3 + slot;
    return folded;
}

/* Which members stand in front of the first one, as requeue.c splits them. */
static NOINLINE u64 front(u64 a, u64 b) {
    u64 first = a & 255, low = b & 192;
    return first <= low ? U64_MAX : first >= low + 64 ? 0 : U64_MAX << (first - low);
}

static NOINLINE u64 signs(u64 a, u64 b) {
    s32 x = (s32)a, y = (s32)b;
    return (u64)((x < y) | (x <= y) << 1 | (x == y) << 2 | ((s64)a < (s64)b) << 3 | ((s8)a < (s8)b) << 4 |
                 ((s16)a >= (s16)b) << 5 | (x < 0) << 6 | ((s64)x < (s64)b) << 7);
}

#define OPERATIONS(X) \
    X(add_u8, (u8)((u8)a + (u8)b)) \
    X(add_u16, (u16)((u16)a + (u16)b)) \
    X(add_u32, (u32)a + (u32)b) \
    X(add_u64, a + b) \
    X(add_u32_constant, (u32)a + 0xfffffff0u) \
    X(subtract_u8, (u8)((u8)a - (u8)b)) \
    X(subtract_u16, (u16)((u16)a - (u16)b)) \
    X(subtract_u32, (u32)a - (u32)b) \
    X(subtract_u64, a - b) \
    X(subtract_u32_widened, (u64)((u32)a - (u32)b) + c) \
    X(multiply_u8, (u8)((u8)a * (u8)b)) \
    X(multiply_u16, (u16)((u32)(u16)a * (u16)b)) \
    X(multiply_u32, (u32)a * (u32)b) \
    X(multiply_u64, a * b) \
    X(multiply_u32_wide, (u64)(u32)a * (u32)b) \
    X(multiply_s32, (u64)(s64)(s32)((u32)a * (u32)b)) \
    X(divide_u8, (u8)a / ((u8)b | 1)) \
    X(divide_u16, (u16)a / ((u16)b | 1)) \
    X(divide_u32, (u32)a / ((u32)b | 1)) \
    X(divide_u64, a / (b | 1)) \
    X(divide_u64_small, a / ((b & 255) + 1)) \
    X(divide_u32_constant, (u32)a / 3) \
    X(divide_u64_constant, a / 1000003) \
    X(remainder_u8, (u8)a % ((u8)b | 1)) \
    X(remainder_u16, (u16)a % ((u16)b | 1)) \
    X(remainder_u32, (u32)a % ((u32)b | 1)) \
    X(remainder_u64, a % (b | 1)) \
    X(remainder_u32_constant, (u32)a % 7) \
    X(shift_left_u8, (u8)((u8)a << (b & 7))) \
    X(shift_left_u32, (u32)a << (b & 31)) \
    X(shift_left_u64, a << (b & 63)) \
    X(shift_right_u8, (u8)a >> (b & 7)) \
    X(shift_right_u32, (u32)a >> (b & 31)) \
    X(shift_right_u64, a >> (b & 63)) \
    X(shift_right_s32, (u64)(s64)((s32)a >> (b & 31))) \
    X(shift_right_s64, (u64)((s64)a >> (b & 63))) \
    X(rotate_u32, (u32)a << (b & 31) | (u32)a >> (-(u32)b & 31)) \
    X(rotate_u64, a << (b & 63) | a >> (-b & 63)) \
    X(not_u32, ~(u32)a) \
    X(negate_u32, 0 - (u32)a) \
    X(negate_s32, (u64)(s64)negate_over_call((s32)a)) \
    X(xor_u32, ((u32)a ^ (u32)b) + (c & 1)) \
    X(compare_u8, ((u8)a < (u8)b) | ((u8)a == (u8)b) << 1) \
    X(compare_u16, ((u16)a > (u16)b) | ((u16)a != (u16)b) << 1) \
    X(compare_u32, ((u32)a < (u32)b) | ((u32)a >= (u32)b) << 1) \
    X(compare_u64, (a < b) | (a <= c) << 1 | (b == c) << 2) \
    X(compare_sum_u32, (u32)((u32)a + (u32)b) < (u32)a) \
    X(compare_difference_u32, (u32)((u32)a - (u32)b) > (u32)c) \
    X(compare_signed, signs(a, b)) \
    X(narrow_u8, (u8)a) \
    X(narrow_u16, (u16)a) \
    X(narrow_u32, (u32)a) \
    X(extend_s8, (u64)(s64)(s8)a) \
    X(extend_s16, (u64)(s64)(s16)a) \
    X(extend_s32, (u64)(s64)(s32)a) \
    X(call_add, add_over_call((u32)a, (u32)b)) \
    X(call_mix, mix_over_call((u16)a, (u8)b, (u32)c)) \
    X(select_u32, (u32)a > (u32)b ? (u32)a - (u32)b : (u32)b - (u32)a) \
    X(index_u32, ((u32)a + (u32)b) % 4 * 8 + c) \
    X(swap_bytes, __builtin_bswap64(a) ^ __builtin_bswap32((u32)b)) \
    X(isolate_lowest, (a & -a) + ((u32)b & -(u32)b)) \
    X(clear_lowest, (a & (a - 1)) ^ ((u32)b & ((u32)b - 1))) \
    X(average, (a & b) + ((a ^ b) >> 1)) \
    X(memory, through_memory(scratch, a, b, c)) \
    X(counters, counters(scratch, a, b)) \
    X(two_thirds, two_thirds((u32)a) ^ two_thirds(b & 63)) \
    X(patience, smaller(saturating_add(a, (3 * (u64)(u32)b + 1) / 2 + (u32)c), b)) \
    X(saturating_add, saturating_add(a, b)) \
    X(smaller, smaller(a, b)) \
    X(tokens, a <= (u64)(u32)b * (u32)c) \
    X(draw, draw(&a) ^ a) \
    X(draw_below, draw(&a) % ((b & 255) + 1)) \
    X(bits, bits(a, b, c)) \
    X(front, front(a, b)) \
    X(slices, slices(a, b, c)) \
    X(quorum, quorum(scratch, a, b, c))

#define DEFINE(name, expression) \
    static NOINLINE u64 do_##name(struct round *scratch, u64 a, u64 b, u64 c) { \
        (void)scratch, (void)a, (void)b, (void)c; \
        return (u64)(expression); \
    }
OPERATIONS(DEFINE)

typedef u64 (*operation)(struct round *, u64, u64, u64);
#define ENTRY(name, expression) do_##name,
static const operation operations[] = {OPERATIONS(ENTRY)};
#define COUNT (sizeof operations / sizeof *operations)

/* What lies in the account: how many inputs, room for a round, the inputs, then the results of each in turn. */
struct batch {
    u64 inputs;
    struct round scratch;
    u64 words[];
};

u64 run_batch(struct batch *batch) {
    u64 *result = batch->words + 3 * batch->inputs;
    for (u64 i = 0; i < batch->inputs; i++) {
        const u64 *in = batch->words + 3 * i;
        for (u64 k = 0; k < COUNT; k++) *result++ = operations[k](&batch->scratch, in[0], in[1], in[2]);
    }
    return 0;
}

/* One account, writable: its data lies behind the count of accounts and 88 bytes of its own. */
u64 entrypoint(u8 *raw) { return run_batch((struct batch *)(raw + 96)); }

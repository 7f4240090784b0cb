/* The positions that a round did not train come back, and the next rounds draw them first: over a pass every sample is trained
 * exactly once. The queue is a ring of ranges; every position below the cursor is in it, in a round that is not final, or
 * included.
 *
 * The ring cannot overflow. A round's slices are contiguous in its batch, so what comes back from one over n members and k
 * ranges is at most (n + 1) / 2 + k ranges; that room is kept free for every round that is not final. Where it cannot be
 * (hundreds of members failing in turn), a round draws one whole range for one member: one range out, at most one back. */
#include "program.h"

static struct range *queue_at(struct rounds *rounds, u64 index) {
    return &rounds->requeue[(rounds->header.requeue_head + index) % MAX_REQUEUE];
}

static void push_range(struct context *c, u64 start, u64 count) {
    struct header *h = &c->rounds->header;
    h->requeued += count;
    if (h->requeue_count) {
        struct range *last = queue_at(c->rounds, h->requeue_count - 1);
        if (last->start + last->count == start && last->count + count <= c->run->limits.batch) {
            last->count += count;
            return;
        }
    }
    struct range *fresh = queue_at(c->rounds, h->requeue_count);
    fresh->start = start;
    fresh->count = count;
    h->requeue_count++;
}

static u64 worst_of_open_rounds(const struct context *c, const struct round *except) {
    u64 worst = 0;
    for (u64 i = 0; i < ROUND_RING; i++) {
        const struct round *round = &c->rounds->ring[i];
        if (round != except && (round->state == ROUND_OPEN || round->state == ROUND_CLOSED)) worst += round->worst_requeue;
    }
    return worst;
}

/* Give the round its positions. Returns among how many members they may be divided: all, or one when the queue is crowded. */
u64 draw_positions(struct context *c, struct round *round, u64 members) {
    struct header *h = &c->rounds->header;
    u64 pieces = (members + 1) / 2;
    u64 wanted = c->run->limits.batch, drawn = 0, ranges = 0;
    u64 crowded = h->requeue_count + worst_of_open_rounds(c, round) + pieces + MAX_RANGES > MAX_REQUEUE;
    if (crowded && h->requeue_count) wanted = queue_at(c->rounds, 0)->count;
    while (drawn < wanted && h->requeue_count && ranges < MAX_RANGES - 1) {
        struct range *front = queue_at(c->rounds, 0);
        u64 count = smaller(front->count, wanted - drawn);
        round->range[ranges].start = front->start;
        round->range[ranges].count = count;
        ranges++;
        drawn += count;
        front->start += count;
        front->count -= count;
        h->requeued -= count;
        if (front->count == 0) {
            h->requeue_head = (h->requeue_head + 1) % MAX_REQUEUE;
            h->requeue_count--;
        }
    }
    if (drawn < wanted) {
        round->range[ranges].start = c->run->cursor;
        round->range[ranges].count = wanted - drawn;
        c->run->cursor += wanted - drawn;
        drawn = wanted;
        ranges++;
    }
    round->range_count = (u8)ranges;
    round->positions = drawn;
    round->worst_requeue = crowded ? 1 : (u32)(pieces + ranges);
    return crowded ? 1 : members;
}

/* Push [from, to) of the round's batch; `range` and `base` remember where the last call ended, for from only grows. */
static void push_piece(struct context *c, const struct round *round, u64 from, u64 to, u64 *range, u64 *base) {
    while (from < to) {
        const struct range *r = &round->range[*range];
        if (from >= *base + r->count) {
            *base += r->count;
            ++*range;
            continue;
        }
        u64 end = smaller(to, *base + r->count);
        push_range(c, r->start + (from - *base), end - from);
        from = end;
    }
}

/* Put back the slices of all members assigned and not included, neighbours together. */
void requeue_excluded(struct context *c, const struct round *round) {
    u64 range = 0, base = 0, from = 0, to = 0;
    bitmap excluded;
    u64 any = 0;
    for (u64 w = 0; w < 4; w++) any |= excluded.word[w] = round->assigned.word[w] & ~round->included.word[w];
    if (!any) return;
    for (u64 i = 0; i < MAX_MEMBERS; i++) {
        u64 slot = (round->first_slot + i) % MAX_MEMBERS;
        if (!has_bit(&excluded, slot)) continue;
        u64 offset = round->slice_offset[slot];
        if (offset != to) {
            push_piece(c, round, from, to, &range, &base);
            from = offset;
        }
        to = offset + round->slice_count[slot];
    }
    push_piece(c, round, from, to, &range, &base);
}

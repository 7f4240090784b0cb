/* The positions that a round did not train come back, and the next rounds draw them first: over a pass every sample is
 * trained exactly once. The queue is a ring of ranges; every position below the cursor is in it, in a round that is
 * not final, or included.
 *
 * The ring cannot overflow. A round's slices are contiguous in its batch, so what comes back from one over n members
 * and k ranges is at most (n + 1) / 2 + k ranges; that room is kept free for every round that is not final. Where it
 * cannot be (hundreds of members failing in turn), a round draws whole ranges, each for one member: as many out as can
 * come back. */
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
        int open = round->state == ROUND_OPEN || round->state == ROUND_CLOSED;
        if (round != except && open) worst += round->worst_requeue;
    }
    return worst;
}

/* Whole ranges from the queue, one per member, as many as a batch has room for. */
static void draw_ranges(struct context *c, struct round *round, u64 members) {
    struct header *h = &c->rounds->header;
    u64 most = smaller(MAX_RANGES, members), drawn = 0, ranges = 0;
    while (ranges < most && h->requeue_count) {
        const struct range *front = queue_at(c->rounds, 0);
        if (ranges && drawn + front->count > c->run->limits.batch) break;
        round->range[ranges++] = *front;
        drawn += front->count;
        h->requeued -= front->count;
        h->requeue_head = (h->requeue_head + 1) % MAX_REQUEUE;
        h->requeue_count--;
    }
    round->range_count = (u8)ranges;
    round->positions = drawn;
    round->worst_requeue = (u32)ranges;
}

/* Give the round its positions. Returns 0 when the queue is crowded, and each range must go to one member. */
u64 draw_positions(struct context *c, struct round *round, u64 members) {
    struct header *h = &c->rounds->header;
    u64 pieces = (members + 1) / 2;
    u64 wanted = c->run->limits.batch, drawn = 0, ranges = 0;
    u64 crowded = h->requeue_count + worst_of_open_rounds(c, round) + pieces + MAX_RANGES > MAX_REQUEUE;
    if (crowded && h->requeue_count) {
        draw_ranges(c, round, members);
        return 0;
    }
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
    round->worst_requeue = (u32)(pieces + ranges);
    return 1;
}

/* A run of neighbours whose slices come back: [from, to) of the batch, and where push_piece stands. */
struct piece {
    u64 from;
    u64 to;
    u64 range;
    u64 base;
};

/* Push the piece's positions. Pieces come in the order of the batch, so the walk over the ranges goes on from the last
 * one. */
static void push_piece(struct context *c, const struct round *round, struct piece *piece) {
    u64 from = piece->from, to = piece->to;
    while (from < to) {
        const struct range *r = &round->range[piece->range];
        u64 range_end = piece->base + r->count;
        if (from >= range_end) {
            piece->base = range_end;
            piece->range++;
            continue;
        }
        u64 end = smaller(to, range_end);
        push_range(c, r->start + (from - piece->base), end - from);
        from = end;
    }
}

static void add_slices(struct context *c, const struct round *round, const bitmap *members, struct piece *piece) {
    for_each (slot, members) {
        u64 offset = round->slice_offset[slot];
        if (offset != piece->to) {
            push_piece(c, round, piece);
            piece->from = offset;
        }
        piece->to = offset + round->slice_count[slot];
    }
}

/* Put back the slices of all members assigned and not included, neighbours together, in the order of the batch: from
 * the rotated first member to the last, then from the first. */
void requeue_excluded(struct context *c, const struct round *round) {
    struct piece piece = {0, 0, 0, 0};
    bitmap front, back;
    for (u64 w = 0; w < 4; w++) {
        u64 excluded = round->assigned.word[w] & ~round->included.word[w];
        u64 first = round->first_slot, low = 64 * w;
        u64 from_first = first <= low ? U64_MAX : first >= low + 64 ? 0 : U64_MAX << (first - low);
        front.word[w] = excluded & from_first;
        back.word[w] = excluded & ~from_first;
    }
    add_slices(c, round, &front, &piece);
    add_slices(c, round, &back, &piece);
    push_piece(c, round, &piece);
}

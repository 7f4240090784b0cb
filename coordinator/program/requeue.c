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

static u64 worst_of_open_rounds(const struct context *c, const struct round *except) {
    u64 worst = 0;
    for (u64 i = 0; i < ROUND_RING; i++) {
        const struct round *round = &c->rounds->ring[i];
        int open = round->state == ROUND_OPEN || round->state == ROUND_CLOSED;
        if (round != except && open) worst += round->worst_requeue;
    }
    return worst;
}

/* Positions of the round that begins: limits.batch, up to which the first rounds under the present terms lead in equal
 * steps. */
static u64 batch_of_round(const struct run *run) {
    u64 batch = run->limits.batch, done = run->round - run->model_round;
    if (done >= run->course.ramp_rounds) return batch;
    u64 from = smaller(run->course.ramp_batch, batch);
    return from + (batch - from) * done / run->course.ramp_rounds;
}

/* Whole ranges from the queue, one per member, as many as a batch has room for. */
static void draw_ranges(struct context *c, struct round *round, u64 batch, u64 members) {
    struct header *h = &c->rounds->header;
    u64 most = smaller(MAX_RANGES, members), drawn = 0, ranges = 0;
    while (ranges < most && h->requeue_count) {
        const struct range *front = queue_at(c->rounds, 0);
        if (ranges && drawn + front->count > batch) break;
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
    u64 wanted = batch_of_round(c->run), drawn = 0, ranges = 0;
    u64 crowded = h->requeue_count + worst_of_open_rounds(c, round) + pieces + MAX_RANGES > MAX_REQUEUE;
    if (crowded && h->requeue_count) {
        draw_ranges(c, round, wanted, members);
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

/* A round's slices on their way back into the queue. */
struct returning {
    const struct range *range; /* of the round: where the walk over its batch stands, and that range's start there */
    u64 base;
    u64 from; /* neighbours that go together: [from, to) of the batch */
    u64 to;
    struct range *ring;
    struct range *last; /* of the queue; NULL: it is empty */
    u64 end; /* index behind it */
    u64 positions; /* returned so far */
    u64 batch;
};

/* Neighbours in the data are one range, as long as that is no longer than a batch. */
INLINE void push_range(struct returning *r, u64 start, u64 count) {
    r->positions += count;
    struct range *last = r->last;
    if (last && last->start + last->count == start && last->count + count <= r->batch) {
        last->count += count;
        return;
    }
    last = r->last = &r->ring[r->end++ % MAX_REQUEUE];
    last->start = start;
    last->count = count;
}

/* Pieces come in the order of the batch, so the walk over the ranges goes on from the last one. */
static void push_piece(struct returning *r) {
    u64 from = r->from, to = r->to;
    while (from < to) {
        u64 range_end = r->base + r->range->count;
        if (from >= range_end) {
            r->base = range_end;
            r->range++;
            continue;
        }
        u64 end = smaller(to, range_end);
        push_range(r, r->range->start + (from - r->base), end - from);
        from = end;
    }
}

static void return_slices(struct returning *r, const struct round *round, const bitmap *members) {
    for_each (slot, members) {
        u64 offset = round->slice_offset[slot];
        if (offset != r->to) {
            push_piece(r);
            r->from = offset;
        }
        r->to = offset + round->slice_count[slot];
    }
}

/* Put back the slices of all members assigned and not included, neighbours together, in the order of the batch: from
 * the rotated first member to the last, then from the first. */
void requeue_excluded(struct context *c, const struct round *round) {
    bitmap front, back;
    for (u64 w = 0; w < 4; w++) {
        u64 excluded = round->assigned.word[w] & ~round->included.word[w];
        u64 first = round->first_slot, low = 64 * w;
        u64 from_first = first <= low ? U64_MAX : first >= low + 64 ? 0 : U64_MAX << (first - low);
        front.word[w] = excluded & from_first;
        back.word[w] = excluded & ~from_first;
    }
    struct header *h = &c->rounds->header;
    u64 begin = h->requeue_head + h->requeue_count;
    struct returning r = {round->range, 0, 0, 0, c->rounds->requeue, NULL, begin, 0, c->run->limits.batch};
    if (h->requeue_count) r.last = queue_at(c->rounds, h->requeue_count - 1);
    return_slices(&r, round, &front);
    return_slices(&r, round, &back);
    push_piece(&r);
    h->requeue_count += (u32)(r.end - begin);
    h->requeued += r.positions;
}

// One step of a dense recurrence whose matrix does not fit on chip.
// 04_kernels_wide.ipynb explains each section.

// --- section: sizes
constexpr int SLICES = 8, THREADS = 32 * SLICES; // a warp adds up an eighth of every sum
// units and samples of a block; UNITS x SAMPLES of each in a lane
constexpr int TU = 4 * UNITS, TB = 8 * SAMPLES;
constexpr int UP = (M + TU - 1) / TU * TU; // a row of the matrix, padded to whole blocks
// summands of a round; padded length of the sums
constexpr int DEEP = 4 * SLICES, ROUNDS = (M + DEEP - 1) / DEEP, KP = ROUNDS * DEEP;
// float4 of one summand, and of the four that a warp adds in a round
constexpr int LINE = (TU + TB) / 4, PIECE = 4 * LINE;
constexpr int COPIES = (PIECE + 31) / 32; // float4 of a piece that a lane brings
constexpr int GROUP = 4; // samples of one unit that a thread finishes together, a float4
constexpr int ITEMS = TU * TB / GROUP, TURNS = (ITEMS + THREADS - 1) / THREADS;

// --- section: copies
DEVICE void copy16(float4 *to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(smem(to)), "l"(from)
                 : "memory");
}
DEVICE void put(float *to, float4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

// --- section: start
// forward:  w = U^T, in = drive of this step, out = states of this step or null,
//           end = h_T (in the last step) or null
// backward: w = U, in = dL/dh_t or null, y = states of this step, out = delta;
//           in the last launch, end = dL/dh_0 and nothing else
struct Step {
    const float *w, *in, *y, *now;
    float *next, *out, *end;
    i64 B, BP, run, in_run;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide_step(const Step p) {
    // [SLICES][PIECES][4][LINE], and in the end the shares [SLICES][TU][TB + 4]
    extern __shared__ float4 pool[];
    const int tid = threadIdx.x, lane = tid & 31, slice = tid >> 5;
    // so laid out, a read of 16 bytes a lane takes two turns, not four
    const int ti = (lane & 1) + (lane >> 4) * 2, tj = lane >> 1 & 7;
    const int u0 = blockIdx.x * TU, b0 = blockIdx.y * TB, B = (int)p.B;
    const i64 r = blockIdx.z;

    float4 *ring = pool + slice * PIECES * PIECE;
    const float *from[COPIES]; // a column of the matrix or of the state, whose rows go by
    i64 stride[COPIES];
    UNROLL for (int n = 0; n < COPIES; n++) {
        const int e = n * 32 + lane, k = slice * 4 + e / LINE, c = 4 * (e % LINE);
        from[n] = c < TU ? p.w + (r * KP + k) * UP + u0 + c
                         : p.now + (r * KP + k) * p.BP + b0 + c - TU;
        stride[n] = DEEP * (c < TU ? (i64)UP : p.BP);
    }
    auto fetch = [&](int round) {
        if (round < ROUNDS)
            UNROLL for (int n = 0; n < COPIES; n++) {
                const int e = n * 32 + lane;
                if (PIECE % 32 == 0 || e < PIECE)
                    copy16(ring + round % PIECES * PIECE + e, from[n]);
                from[n] += stride[n];
            }
        copy_commit();
    };
    for (int n = 0; n < PIECES - 1; n++) fetch(n);

    // what the end needs comes from far away: it is asked for now
    float x[TURNS][GROUP] = {}, z[TURNS][GROUP] = {};
    UNROLL for (int n = 0; n < TURNS; n++) {
        const int e = n * THREADS + tid, u = u0 + e % TU, b = b0 + e / TU * GROUP;
        auto load = [&](float (&v)[GROUP], const float *from) {
            UNROLL for (int s = 0; s < GROUP; s++)
                if (e < ITEMS && u < M && b + s < B) v[s] = from[(i64)(b + s) * M + u];
        };
        if (p.in) load(x[n], p.in + r * p.in_run);
        if (BACK && ACT && p.y) load(z[n], p.y + r * p.run);
    }

// --- section: sum
    float acc[UNITS][SAMPLES] = {}, w[2][UNITS], h[2][SAMPLES];
    auto look = [&](int round, int k) { // the lane's part of one summand, into registers
        const float4 *row = ring + round % PIECES * PIECE + k % 4 * LINE;
        UNROLL for (int i = 0; i < UNITS / 4; i++) put(w[k % 2] + 4 * i, row[4 * i + ti]);
        UNROLL for (int i = UNITS / 4 * 4; i < UNITS; i++)
            w[k % 2][i] = ((const float *)row)[4 * i + ti];
        UNROLL for (int i = 0; i < SAMPLES / 4; i++)
            put(h[k % 2] + 4 * i, row[TU / 4 + 8 * i + tj]);
    };
    copy_wait<PIECES - 2>();
    __syncwarp();
    look(0, 0);
#pragma unroll 1
    for (int n = 0; n < ROUNDS; n++) {
        fetch(n + PIECES - 1);
        UNROLL for (int k = 0; k < 4; k++) {
            // the next piece is here, and all lanes are done with the last
            if (k == 3) copy_wait<PIECES - 2>(), __syncwarp();
            look(n + (k == 3), k + 1);
            UNROLL for (int i = 0; i < UNITS; i++)
                UNROLL for (int s = 0; s < SAMPLES; s++)
                    acc[i][s] = fmaf(w[k % 2][i], h[k % 2][s], acc[i][s]);
        }
    }

// --- section: end
    copy_wait<0>();
    __syncthreads();
    float *share = (float *)pool;
    UNROLL for (int i = 0; i < UNITS; i++) {
        const int u = i < UNITS / 4 * 4 ? i / 4 * 16 + 4 * ti + i % 4 : 4 * i + ti;
        UNROLL for (int s = 0; s < SAMPLES / 4; s++)
            *(float4 *)(share + (slice * TU + u) * (TB + 4) + 32 * s + 4 * tj) = make_float4(
                acc[i][4 * s], acc[i][4 * s + 1], acc[i][4 * s + 2], acc[i][4 * s + 3]);
    }
    __syncthreads();
    UNROLL for (int n = 0; n < TURNS; n++) {
        const int e = n * THREADS + tid, u = u0 + e % TU, b = b0 + e / TU * GROUP;
        if (e >= ITEMS || u >= M) continue;
        float v[GROUP] = {};
        UNROLL for (int k = 0; k < SLICES; k++) {
            float q[GROUP];
            put(q, *(const float4 *)(share + (k * TU + u - u0) * (TB + 4) + b - b0));
            UNROLL for (int s = 0; s < GROUP; s++) v[s] += q[s];
        }
        UNROLL for (int s = 0; s < GROUP; s++) {
            v[s] += x[n][s];
            if (!BACK) v[s] = act(v[s]);
            else if (ACT == 1 && p.y) v[s] = z[n][s] <= 0.f ? 0.f : v[s];
            else if (ACT == 2 && p.y) v[s] *= 1.f - z[n][s] * z[n][s];
        }
        auto store = [&](float *to) {
            UNROLL for (int s = 0; s < GROUP; s++)
                if (b + s < B) to[(i64)(b + s) * M + u] = v[s];
        };
        if (p.out) store(p.out + r * p.run);
        if (p.end) store(p.end + r * B * M);
        if (p.next)
            *(float4 *)(p.next + (r * KP + u) * p.BP + b) = make_float4(v[0], v[1], v[2],
                                                                        v[3]);
    }
}

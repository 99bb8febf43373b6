// The wave recurrence: forward, backward, sums over the batch. All sizes are macros.
// 04_kernels_wave.ipynb explains each section.

// --- section: sizes
constexpr int SL = 2 * MT; // slots: consecutive neurons of one group of 4 lanes
// groups, warps and threads of one sample
constexpr int NG = (N + SL - 1) / SL, W = (NG + 7) / 8, TH = 32 * W;
constexpr int TAIL = N % SL; // slots in use in the last group; 0: all of them
constexpr int CQ = (C + 7) / 8, MC = (CQ + 1) / 2; // channel tiles of 8, of 16
// 8x8 tiles of a warp; 32-bit words of one bf16 term of a state
constexpr int MATS = SL * CQ, TILE = W * MATS * 32;
constexpr int EV = (NT * CQ + 3) / 4; // uint4 of one edge row
constexpr int VALS = MT * CQ;         // float4 of a thread's share of a state
// uint4 of weights a lane keeps in shared memory
constexpr int WV = WSM ? 3 * NT * CQ * CQ / 4 : 0;
// floats of one access to a natural array
constexpr int VW = N % 4 == 0 && SL % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
constexpr bool FAITHFUL = NT == 3;
static_assert((RING & (RING - 1)) == 0 && RING >= 2 && C <= 32 && !(WSM && CQ % 2));

// [j][q]: 0, 1 are slot j, channels 2*q4, 2*q4+1; 2, 3 are slot MT+j
using Acc = float[MT][CQ][4];
using Frag = u32[NT][SL][CQ]; // [term][slot][q]: two channels packed
using Wreg = u32[WSM ? 1 : NT][WSM ? 1 : 3][WSM ? 1 : CQ][WSM ? 1 : CQ];
// the row left of slot 0 and the row right of slot SL-1
struct Edge {
    u32 l[NT][CQ], r[NT][CQ];
};
#define EACH UNROLL for (int e_ = 0; e_ < VALS * 4; e_++)
#define AT(a) (a)[e_ / (4 * CQ)][e_ / 4 % CQ][e_ % 4]

struct Lane { // who this thread is, within its sample
    int tid = threadIdx.x % TH, lane = tid & 31, warp = tid >> 5, g = lane >> 2, q4 = lane & 3,
        grp = tid >> 2;
    bool used = NG % 8 == 0 || grp < NG, last = grp == NG - 1;
    int left = used ? (grp ? grp - 1 : NG - 1) * 4 + q4 : tid,
        right = used ? (last ? 0 : grp + 1) * 4 + q4 : tid;
    u32 zero; // 0, but the compiler cannot know
    DEVICE Lane(i64 T) : zero(u32(T >> 62)) {}
    // in a register of its own, see put_edges
    DEVICE u32 copy(u32 x) const { return x ^ zero; }
    DEVICE bool owns(int slot) const { return used && (TAIL == 0 || !last || slot < TAIL); }
};

// --- section: instructions
DEVICE void mma8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
DEVICE u32 transpose8(u32 a) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
template <bool TRANS> DEVICE void ldmatrix(u32 (&d)[4], u32 at) {
    if (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(at) : "memory");
}
DEVICE void copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// lo and hi, each where its half of h is not 0: one comparison for both (as half floats: only
// the bits matter)
DEVICE void where_not_zero(float &lo, float &hi, u32 h) {
    asm("{.reg .pred p, q; setp.neu.f16x2 p|q, %2, %3; selp.f32 %0, %0, 0f00000000, p; "
        "selp.f32 %1, %1, 0f00000000, q;}"
        : "+f"(lo), "+f"(hi)
        : "r"(h), "r"(0));
}

// --- section: arrays
template <int K> struct Vec {
    using T = float4;
};
template <> struct Vec<2> {
    using T = float2;
};
template <> struct Vec<1> {
    using T = float;
};
using Piece = Vec<VW>::T;                // VW consecutive neurons of one channel
constexpr int PIECES = 2 * CQ * SL / VW; // of one thread, of one state
constexpr int CN = C * N;
DEVICE void put(Piece *to, float *(&e)[VW]) {
    Piece x;
    UNROLL for (int s = 0; s < VW; s++) ((float *)&x)[s] = *e[s];
    *to = x;
}

// Visit a thread's pieces: f(piece number, offset in the natural array [C][N], is it real, its
// VW elements of `a`).
template <class F_> DEVICE void pieces(Acc &a, const Lane &L, F_ f) {
    UNROLL for (int k = 0; k < PIECES; k++) {
        const int v = k % (SL / VW) * VW, i = k / (SL / VW) % 2, q = k / (SL / VW) / 2,
                  ch = 8 * q + 2 * L.q4 + i;
        float *e[VW];
        UNROLL for (int s = 0; s < VW; s++) e[s] = &a[(v + s) % MT][q][(v + s) / MT * 2 + i];
        f(k, ch * N + L.grp * SL + v, L.owns(v) && (C % 8 == 0 || ch < C), e);
    }
}
// 0 on padding, which stays 0 for ever
DEVICE void load(Acc &a, const float *from, const Lane &L) {
    pieces(a, L, [&](int, int at, bool real, float *(&e)[VW]) {
        Piece v = {};
        if (from && real) v = *(const Piece *)(from + at);
        UNROLL for (int s = 0; s < VW; s++) *e[s] = ((float *)&v)[s];
    });
}
DEVICE void store(float *to, Acc &a, const Lane &L) {
    pieces(a, L, [&](int, int at, bool real, float *(&e)[VW]) {
        if (real) put((Piece *)(to + at), e);
    });
}
// The same through a ring in shared memory: a thread fetches and reads its own pieces, so no
// barrier is needed.
DEVICE void ring_zero(Piece *ring, int n, const Lane &L) {
    for (int i = 0; i < n * PIECES; i++) ring[i * TH + L.tid] = Piece{};
}
DEVICE void ring_fetch(Piece *stage, const float *from, Acc &a, const Lane &L) {
    pieces(a, L, [&](int k, int at, bool real, float *(&)[VW]) {
        if (real) copy_async<4 * VW, true>(smem(stage + k * TH + L.tid), from + at);
    });
}
DEVICE void ring_add(Acc &a, const Piece *stage, bool add, const Lane &L) {
    pieces(a, L, [&](int k, int, bool, float *(&e)[VW]) {
        const Piece v = stage[k * TH + L.tid];
        UNROLL for (int s = 0; s < VW; s++)
            *e[s] = (add ? *e[s] : 0.f) + ((const float *)&v)[s];
    });
}

// --- section: feed
// What step t of the sample needs from outside (x_t, or a table row) goes through shared
// memory too, 32 steps at a time, two such chunks beside each other: a load of the same step
// would have to arrive within a step. One warp fetches, all read. FW: words of a step;
// FEED: uint4 of the two chunks.
constexpr int FW = F > 0 ? F : 1, FEED = 16 * FW;
DEVICE void feed_fetch(u32 *feed, const float *x, const i64 *rows, int chunk, i64 B, int T,
                       const Lane &L) {
    const int t = 32 * chunk + L.lane;
    if (L.warp || t < 0 || t >= T) return;
    UNROLL for (int f = 0; f < FW; f++)
        copy_async<4, true>(smem(feed + t % 64 * FW + f), F ? (const void *)(x + t * B * F + f)
                                                            : (const void *)(rows + t * B));
}

// --- section: split
// first terms of states on the grid of their group's largest
constexpr bool SHORT = FAITHFUL && SBITS > 0;
DEVICE void split(Frag &a, const Acc &v) { // x = a[0] + a[1] (+ a[2])
    float grid = 0.f, top[4] = {}; // four short chains of comparisons instead of a long one
    if (SHORT) {
        EACH top[e_ % 4] = fmaxf(top[e_ % 4], fabsf(AT(v)));
        float most = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
        // the four lanes that share these neurons
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        grid = grid_above(__float_as_uint(most), SBITS);
    }
    UNROLL for (int s = 0; s < SL; s++)
        UNROLL for (int q = 0; q < CQ; q++) {
            float x = v[s % MT][q][s / MT * 2], y = v[s % MT][q][s / MT * 2 + 1];
            UNROLL for (int k = 0; k < NT; k++) {
                if (SHORT && k == 0) {
                    const float hx = (x + grid) - grid, hy = (y + grid) - grid;
                    a[k][s][q] = __byte_perm(__float_as_uint(hx), __float_as_uint(hy), 0x7632);
                    x -= hx, y -= hy;
                } else {
                    a[k][s][q] = pack(x, y);
                    x -= low(a[k][s][q]), y -= high(a[k][s][q]);
                }
            }
        }
}

// --- section: weights
// Two neighbouring weights of one tap as a right operand; FLIP: the transposed, mirrored
// kernel of the backward pass.
template <bool FLIP> DEVICE void weight(u32 (&w)[NT], const float *u, float grid, int tap,
                                        int kq, int nq, const Lane &L) {
    float v[2];
    UNROLL for (int i = 0; i < 2; i++) {
        const int k = 8 * kq + 2 * L.q4 + i, n = 8 * nq + L.g, co = FLIP ? k : n,
                  ci = FLIP ? n : k;
        v[i] = k < C && n < C ? u[(co * C + ci) * 3 + (FLIP ? 2 - tap : tap)] : 0.f;
    }
    UNROLL for (int k = 0; k < NT; k++) {
        w[k] = FAITHFUL && k == 0 ? pack((v[0] + grid) - grid, (v[1] + grid) - grid)
                                  : pack(v[0], v[1]);
        v[0] -= low(w[k]), v[1] -= high(w[k]);
    }
}
// us: C*C*3 floats of shared memory, free again after the next barrier.
template <bool FLIP>
DEVICE void load_weights(Wreg &w, uint4 *wsm, const float *u, float *us, const Lane &L) {
    for (int i = threadIdx.x; i < C * C * 3; i += blockDim.x) us[i] = u[i];
    __syncthreads();
    float grid = 0.f;
    if (FAITHFUL) {
        float x = 0.f;
        for (int i = L.lane; i < C * C * 3; i += 32) x = fmaxf(x, fabsf(us[i]));
        grid = grid_above(__reduce_max_sync(~0u, __float_as_uint(x)), WBITS);
    }
    if constexpr (WSM) {
        u32 *o = (u32 *)wsm;
        // i -> (tap, kq, nq)
        for (int i = threadIdx.x >> 5; i < 3 * CQ * CQ; i += blockDim.x >> 5) {
            const int nq = i % CQ, kq = i / CQ % CQ, tap = i / (CQ * CQ);
            u32 t[NT];
            weight<FLIP>(t, us, grid, tap, kq, nq, L);
            UNROLL for (int k = 0; k < NT; k++) { // one uint4: nq, nq+1 of kq, kq+1
                const int at = ((k * 3 + tap) * CQ + kq / 2 * 2) * CQ / 4 + nq / 2;
                o[(at * 32 + L.lane) * 4 + nq % 2 * 2 + kq % 2] = t[k];
            }
        }
    } else {
        UNROLL for (int i = 0; i < 3 * CQ * CQ; i++) {
            u32 t[NT];
            weight<FLIP>(t, us, grid, i / (CQ * CQ), i / CQ % CQ, i % CQ, L);
            UNROLL for (int k = 0; k < NT; k++)
                w[k][i / (CQ * CQ)][i / CQ % CQ][i % CQ] = t[k];
        }
    }
    __syncthreads();
}

// --- section: edges
DEVICE void put_edges(uint4 *eb, const Frag &a, const Lane &L) {
    UNROLL for (int e = 0; e < 2; e++) {
        u32 r[EV * 4] = {};
        UNROLL for (int k = 0; k < NT; k++)
            UNROLL for (int q = 0; q < CQ; q++)
                r[k * CQ + q] = L.copy(e == 0           ? a[k][0][q]
                                       : TAIL && L.last ? a[k][TAIL ? TAIL - 1 : 0][q]
                                                        : a[k][SL - 1][q]);
        UNROLL for (int i = 0; i < EV; i++)
            eb[(e * EV + i) * TH + L.tid] = make_uint4(r[4 * i], r[4 * i + 1], r[4 * i + 2],
                                                       r[4 * i + 3]);
    }
}
DEVICE void get_edges(Edge &E, const uint4 *eb, const Lane &L) {
    UNROLL for (int e = 0; e < 2; e++) {
        u32 r[EV * 4];
        UNROLL for (int i = 0; i < EV; i++) {
            const uint4 v = eb[((1 - e) * EV + i) * TH + (e == 0 ? L.left : L.right)];
            r[4 * i] = v.x, r[4 * i + 1] = v.y, r[4 * i + 2] = v.z, r[4 * i + 3] = v.w;
        }
        UNROLL for (int k = 0; k < NT; k++)
            UNROLL for (int q = 0; q < CQ; q++) (e == 0 ? E.l : E.r)[k][q] = r[k * CQ + q];
    }
}
DEVICE u32 row(const Frag &a, const Edge &E, int k, int s, int q, const Lane &L) {
    if (s < 0) return E.l[k][q];
    if (s >= SL) return E.r[k][q];
    if (TAIL && s == TAIL) return L.last ? E.r[k][q] : a[k][s][q];
    return a[k][s][q];
}

// --- section: convolution
// which operand of the products stays longest in hand
constexpr bool STATE_FIRST = FAITHFUL != bool(WSM);
// own rows that sit beside an edge: a copy?
constexpr bool COPIES = !TAIL && (FAITHFUL ? WSM || (!FORWARD && F) : !WSM);
// m += products of first terms, c += all smaller products. EDGE: those that need a neighbour's
// row; otherwise the others.
template <bool EDGE, int tap> DEVICE void conv_tap(Acc &m, Acc &c, const Frag &a,
                                                   const Edge &E, const Wreg &wr,
                                                   const uint4 *wsm, const Lane &L) {
    if constexpr (!STUB && (!EDGE || TAIL || tap != 1) && (EDGE || !TAIL) &&
                  (EDGE || MT > 1 || tap == 1)) {
#define TILES                               \
    UNROLL for (int j = 0; j < MT; j++)     \
        UNROLL for (int n = 0; n < CQ; n++) \
            if ((TAIL || (tap == 0 && j == 0) || (tap == 2 && j == MT - 1)) == EDGE)
#define ROW(k, q, s, edge) \
    (EDGE && COPIES && tap == edge ? L.copy(row(a, E, k, s, q, L)) : row(a, E, k, s, q, L))
#define A(k, q) ROW(k, q, j + tap - 1, 2), ROW(k, q, j + tap - 1 + MT, 0)
        UNROLL for (int q = 0; q + 1 < CQ; q += 2)
            UNROLL for (int outer = 0; outer < NT; outer++) {
                UNROLL for (int inner = 0; inner < NT - outer; inner++) {
                    // terms of weight and state
                    const int kw = STATE_FIRST ? inner : outer,
                              ka = STATE_FIRST ? outer : inner;
                    u32 w[CQ][2];
                    if constexpr (WSM) {
                        UNROLL for (int i = 0; i < CQ / 2; i++) {
                            const uint4 v =
                                wsm[(((kw * 3 + tap) * CQ + q) * CQ / 4 + i) * 32 + L.lane];
                            w[2 * i][0] = v.x, w[2 * i][1] = v.y, w[2 * i + 1][0] = v.z,
                                  w[2 * i + 1][1] = v.w;
                        }
                    } else {
                        UNROLL for (int n = 0; n < CQ; n++)
                            w[n][0] = wr[kw][tap][q][n], w[n][1] = wr[kw][tap][q + 1][n];
                    }
                    TILES mma(ka + kw ? c[j][n] : m[j][n], A(ka, q), A(ka, q + 1), w[n][0],
                              w[n][1]);
                }
            }
        if constexpr (CQ % 2) { // an odd channel tile: group first and second term instead
            constexpr int q = CQ - 1, lo = NT - 1;
            TILES mma8(m[j][n], A(0, q), wr[0][tap][q][n]);
            TILES mma(c[j][n], A(0, q), A(1, q), wr[1][tap][q][n], wr[0][tap][q][n]);
            if (FAITHFUL) {
                TILES mma(c[j][n], A(0, q), A(1, q), wr[lo][tap][q][n], wr[1][tap][q][n]);
                TILES mma8(c[j][n], A(lo, q), wr[0][tap][q][n]);
            }
        }
    }
}
template <bool EDGE> DEVICE void conv(Acc &m, Acc &c, const Frag &a, const Edge &E,
                                      const Wreg &w, const uint4 *wsm, const Lane &L) {
    conv_tap<EDGE, 1>(m, c, a, E, w, wsm, L);
    conv_tap<EDGE, 0>(m, c, a, E, w, wsm, L);
    conv_tap<EDGE, 2>(m, c, a, E, w, wsm, L);
}

// --- section: forward_setup
#if FORWARD
// x [R|1][T][B][F], V [R][F][C][N], b [R][C][N]  or  index [R|1][T][B], table [R][rows][C][N]
// (in V); h0 [R][B][C][N] or null. Out: H [R][hrun] = [B][T+1][HTERMS][TILE] (the states for
// backward), y [R][B][C][N] or, with STATES, [R][T][B][C][N].
struct Forward {
    const float *u, *V, *b, *h0, *x;
    const i64 *index;
    u32 *H;
    float *y;
    i64 B, T, xrun, rows, hrun;
};

extern "C" __global__ void __launch_bounds__(TH, MINF) wave_forward(const Forward p) {
    extern __shared__ uint4 sm[];
    const Lane L(p.T);
    const i64 b = blockIdx.x, r = blockIdx.y, rb = r * p.B + b;
    const int T = (int)p.T;
    uint4 *eb = sm, *wsm = eb + 4 * EV * TH;
    u32 *feed = (u32 *)(wsm + WV * 32);
    Piece *ring = (Piece *)(wsm + WV * 32 + FEED);

    Wreg w;
    load_weights<false>(w, wsm, p.u + r * C * C * 3, (float *)ring, L);
    Acc m, c, bias = {};
    float V[F > 0 ? F : 1][MT][CQ][4];
    if (F) {
        UNROLL for (int f = 0; f < F; f++) load(V[f], p.V + (r * F + f) * CN, L);
        load(bias, p.b + r * CN, L);
    } else ring_zero(ring, RING, L);

// --- section: forward_drive
    // The drive: an affine map of x_t, or a table row, fetched RING steps ahead.
    const float *x = p.x + r * p.xrun + b * F, *table = p.V + r * p.rows * CN;
    const i64 *index = p.index + r * p.xrun + b;
    auto fetch = [&](int t) {
        if (F) return;
        const int at = min(t, T - 1); // past the end: again the last, nobody reads it
        const i64 row = p.index ? (i64)feed[at % 64] : at * p.B + b;
        ring_fetch(ring + t % RING * PIECES * TH, table + row * CN, m, L);
        copy_commit();
    };
    auto drive = [&](int t) {
        if (F) {
            EACH {
                float d = AT(bias);
                UNROLL for (int f = 0; f < F; f++)
                    d += AT(V[f]) * __uint_as_float(feed[t % 64 * FW + f]);
                AT(c) = FAITHFUL ? AT(c) + d : d;
            }
        } else {
            copy_wait<RING - 2>();
            ring_add(c, ring + t % RING * PIECES * TH, FAITHFUL, L);
            fetch(t + RING - 1);
        }
    };
    auto feed_ahead = [&](int t) { // the chunk after next; it has half a chunk to arrive
        if (t % 16) return;
        if (t % 32) {
            if (F) copy_wait_all();
        } else if (F || p.index) feed_fetch(feed, x, index, t / 32 + 1, p.B, T, L);
    };
    if (F || p.index) feed_fetch(feed, x, index, 0, p.B, T, L);
    copy_wait_all();
    __syncthreads();

// --- section: forward_step
    auto start = [&](int t) { // fast: sums start from the drive; faithful: it comes last
        EACH AT(m) = AT(c) = 0.f;
        if (!FAITHFUL) drive(t);
    };
    auto &mm = *(FAITHFUL ? &m : &c); // fast: one sum for everything
    Frag a;
    u32 *H = p.H + r * p.hrun + b * (T + 1) * HTERMS * TILE + L.warp * MATS * 32 + L.lane;
    auto keep = [&]() {
        UNROLL for (int k = 0; k < HTERMS; k++)
            UNROLL for (int i = 0; i < MATS; i++) H[k * TILE + i * 32] = a[k][i / CQ][i % CQ];
        H += HTERMS * TILE;
    };
    float *y = p.y + (STATES ? r * T * p.B + b : rb) * CN;
    auto finish = [&](int t) { // sums -> next state
        if (FAITHFUL) drive(t);
        EACH {
            const float v = act(FAITHFUL ? AT(m) + AT(c) : AT(c));
            AT(c) = TAIL && L.last && e_ / (4 * CQ) + (e_ % 4 >> 1) * MT >= TAIL ? 0.f : v;
        }
        split(a, c);
        if (HTERMS) keep();
        if (STATES) {
            store(y, c, L);
            y += p.B * CN;
        }
    };

// --- section: forward_loop
#pragma unroll 1
    for (int t = 0; t < RING - 1; t++) fetch(t);
    load(c, p.h0 ? p.h0 + rb * CN : nullptr, L);
    split(a, c);
    if (HTERMS) keep();
    Edge E;
    put_edges(eb, a, L);
    start(0);
    conv<false>(mm, c, a, E, w, wsm, L);
#pragma unroll 1
    for (int t = 0; t < T - 1; t++) {
        __syncthreads();
        feed_ahead(t);
        get_edges(E, eb + (t & 1) * 2 * EV * TH, L);
        conv<true>(mm, c, a, E, w, wsm, L);
        finish(t);
        put_edges(eb + (~t & 1) * 2 * EV * TH, a, L);
        start(t + 1);
        conv<false>(mm, c, a, E, w, wsm, L);
    }
    __syncthreads();
    get_edges(E, eb + ((T - 1) & 1) * 2 * EV * TH, L);
    conv<true>(mm, c, a, E, w, wsm, L);
    finish(T - 1);
    if (!STATES) store(y, c, L);
}
#else

// --- section: backward_setup
// gy as y. Per block, to be summed afterwards: pU [R][blocks][C][C][3] and
// pV [R][blocks][F+1 or rows][VALS][TH] float4 (last: db). dh0 [R][B][C][N].
// D: deltas in natural order. EMIT 1: [R][T][B][C][N] float. EMIT 2: the same as Store, a pair
// of samples with the same row added up, and rows used once (place = row, else ~row) straight
// to dtable [R][rows][C][N].
struct Backward {
    const float *u, *gy, *x;
    const i64 *index, *place;
    const u32 *H;
    float *pU, *pV, *dh0, *D, *dtable;
    i64 B, T, xrun, rows, hrun;
};

#if NT == 2
using Store = unsigned short; // fast: deltas wait as bf16
#else
using Store = float;
#endif

extern "C" __global__ void __launch_bounds__(TH * SPB, 1) wave_backward(const Backward p) {
    extern __shared__ uint4 sm[];
    const Lane L(p.T);
    const int sub = SPB > 1 ? threadIdx.x / TH : 0; // which of the block's samples
    const i64 b = (i64)blockIdx.x * SPB + sub, r = blockIdx.y, rb = r * p.B + b,
              blk = r * gridDim.x + blockIdx.x;
    const int T = (int)p.T;
    // uint4: h[t], gy[t-1]
    constexpr int HV = HTERMS * TILE / 4, GV = STATES ? PIECES * TH * VW / 4 : 0,
                  STAGE = HV + GV;
    uint4 *eb = sm + sub * 4 * EV * TH, *wsm = sm + SPB * 4 * EV * TH,
          *rings = wsm + WV * 32 + SPB * FEED, *ring = rings + sub * RING * STAGE;
    u32 *feed = (u32 *)(wsm + WV * 32 + sub * FEED);
    // SUMS: [F+1 or rows][VALS][TH] gradients of the drive
    float4 *sums = (float4 *)(rings + SPB * RING * STAGE);
    constexpr bool SUMS = DTAB == 1 || (F && DVSM);
    Piece *waiting = (Piece *)sums; // EMIT 2, SPB 2: deltas of both samples, two steps

    Wreg w;
    load_weights<true>(w, wsm, p.u + r * C * C * 3, (float *)rings, L);
    if (SUMS)
        for (int i = L.tid; i < (F ? F + 1 : p.rows) * VALS * TH; i += TH)
            sums[i] = make_float4(0, 0, 0, 0);

// --- section: backward_fetch
    const uint4 *Hs = (const uint4 *)(p.H + r * p.hrun + b * (T + 1) * HTERMS * TILE) + L.tid;
    Acc m, c;
    if (STATES)
        for (int i = 0; i < RING; i++) ring_zero((Piece *)(ring + i * STAGE + HV), 1, L);
    auto fetch = [&](int t) { // before the start: anything, nobody reads it
        uint4 *stage = ring + (t & (RING - 1)) * STAGE;
        const uint4 *from = Hs + (i64)max(t, 0) * HV;
        UNROLL for (int i = 0; i < (HV + TH - 1) / TH; i++)
            if (HV % TH == 0 || L.tid + i * TH < HV)
                copy_async<16, false>(smem(stage + L.tid) + i * TH * 16, from + i * TH);
        if (STATES)
            ring_fetch((Piece *)(stage + HV), p.gy + ((r * T + max(t - 1, 0)) * p.B + b) * CN,
                       m, L);
        copy_commit();
    };
    const float *x = p.x + r * p.xrun + b * F;
    const i64 *rows = (EMIT == 2 ? p.place : p.index) + r * p.xrun + b;
    constexpr bool FED = F || DTAB == 1 || EMIT == 2;
    int row = 0, mate = 0; // the rows of this sample and of the block's other one

    // ldmatrix addresses (bytes within a stage) of h transposed, two pairs of tiles a load;
    // pair (k, q): slots 2k-off, 2k+1-off of channel tile q. off 0: the middle tap; off 1: the
    // others (their outer slots lie in the next groups).
    constexpr int P0 = MT * CQ, P1 = (MT + 1) * CQ;
    auto address = [&](int pair, int off) {
        const int rg = L.warp * 8 + (L.lane & 7), q = pair % CQ,
                  s = pair / CQ * 2 - off + (L.lane >> 3 & 1);
        int og = rg, os = s;
        if (s < 0)
            og = rg >= NG ? rg : rg ? rg - 1 : NG - 1,
            os = TAIL && og == NG - 1 ? TAIL - 1 : SL - 1;
        else if (s >= SL || (TAIL && rg == NG - 1 && s == TAIL))
            og = rg >= NG ? rg : rg == NG - 1 ? 0 : rg + 1, os = 0;
        return u32((og / 8 * MATS + os * CQ + q) * 128 + og % 8 * 16);
    };
    u32 at0[(P0 + 1) / 2], at1[(P1 + 1) / 2];
    UNROLL for (int i = 0; i < (P0 + 1) / 2; i++)
        at0[i] = i && !TAIL && CQ % 2 == 0
                     ? at0[0] + (i / (CQ / 2) * 2 * CQ + i % (CQ / 2) * 2) * 128
                     : address(min(2 * i + (L.lane >> 4), P0 - 1), 0);
    UNROLL for (int i = 0; i < (P1 + 1) / 2; i++) {
        const int k = 2 * i / CQ;
        at1[i] = k && k < MT && !TAIL && CQ % 2 == 0
                     ? at0[0] + ((2 * k - 1) * CQ + 2 * i % CQ) * 128
                     : address(min(2 * i + (L.lane >> 4), P1 - 1), 1);
    }

// --- section: backward_sums
    float dV[F > 0 ? F : 1][MT][CQ][4], dw[3][MC][CQ][4];
    Acc db;
    EACH {
        AT(db) = 0.f;
        UNROLL for (int f = 0; f < (F > 0 ? F : 1); f++) AT(dV[f]) = 0.f;
    }
    UNROLL for (int i = 0; i < 3 * MC * CQ * 4; i++)
        dw[i / (MC * CQ * 4)][i / (CQ * 4) % MC][i / 4 % CQ][i % 4] = 0.f;

    auto &mm = *(FAITHFUL ? &m : &c);
    Frag a;
    Edge E;
    auto send = [&](Acc &d, int t) { // a delta to its row's only place, or to D
        if (row >= 0) return store(p.dtable + (r * p.rows + row) * CN, d, L);
        Store *to = (Store *)p.D + ((r * T + t) * p.B + b) * CN;
        pieces(d, L, [&](int, int at, bool real, float *(&e)[VW]) {
            if (!real) return;
            if constexpr (FAITHFUL) put((Piece *)((float *)to + at), e);
            else if constexpr (VW == 4)
                *(uint2 *)(to + at) = make_uint2(pack(*e[0], *e[1]), pack(*e[2], *e[3]));
            else if constexpr (VW == 2) *(u32 *)(to + at) = pack(*e[0], *e[1]);
            else to[at] = (Store)pack(*e[0], 0.f);
        });
    };
    auto add_to = [&](float4 *at, float scale) { // sums in shared memory
        UNROLL for (int i = 0; i < VALS; i++) {
            float4 v = at[i * TH + L.tid];
            const float(&d)[4] = c[i / CQ][i % CQ];
            v.x += d[0] * scale, v.y += d[1] * scale, v.z += d[2] * scale, v.w += d[3] * scale;
            at[i * TH + L.tid] = v;
        }
    };

// --- section: backward_delta
    // c (dL/dh[t+1]) -> delta[t]: times act'(h[t+1]); add up what it gives to the drive's
    // gradients; split
    auto delta = [&](int t) {
        const u32 st = smem(ring + (t + 1) % RING * STAGE) + L.warp * MATS * 128;
        if (STATES) ring_add(c, (Piece *)(ring + (t + 1) % RING * STAGE + HV), true, L);
        UNROLL for (int i = 0; i < (MATS + 3) / 4; i++) {
            u32 h[HTERMS][4];
            UNROLL for (int k = 0; k < (ACT ? HTERMS : 0); k++)
                ldmatrix<false>(h[k],
                                st + k * TILE * 4 +
                                    (MATS % 4 ? min(4 * i + (L.lane >> 3), MATS - 1) * 128 +
                                                    L.lane % 8 * 16
                                              : i * 512 + L.lane * 16));
            UNROLL for (int e = 0; e < 4; e++)
                if (4 * i + e < MATS) {
                    const int s = (4 * i + e) / CQ, q = (4 * i + e) % CQ;
                    float &lo = c[s % MT][q][s / MT * 2], &hi = c[s % MT][q][s / MT * 2 + 1];
                    // a small state has no first term
                    if (ACT == 1) where_not_zero(lo, hi, h[0][e] | h[HTERMS > 1][e]);
                    if (ACT == 2) {
                        float x = low(h[0][e]), y = high(h[0][e]);
                        UNROLL for (int k = 1; k < HTERMS; k++)
                            x += low(h[k][e]), y += high(h[k][e]);
                        lo *= 1.f - x * x, hi *= 1.f - y * y;
                    }
                    if (TAIL && L.last && s >= TAIL) lo = hi = 0.f;
                }
        }
        float now[FW];
        if (F)
            UNROLL for (int f = 0; f < F; f++) now[f] = __uint_as_float(feed[t % 64 * FW + f]);
        if (!F && FED) row = (int)feed[t % 64];
        if (SPB == 2) mate = (int)feed[t % 64 + (sub ? -64 : 64)];
        split(a, c);
        if (F && !SUMS) {
            EACH {
                AT(db) += AT(c);
                UNROLL for (int f = 0; f < F; f++) AT(dV[f]) += AT(c) * now[f];
            }
        }
        if (F && SUMS) {
            add_to(sums + F * VALS * TH, 1.f);
            UNROLL for (int f = 0; f < F; f++) add_to(sums + f * VALS * TH, now[f]);
        }
        if (DTAB == 1) add_to(sums + row * VALS * TH, 1.f);
        if (EMIT == 1) store(p.D + ((r * T + t) * p.B + b) * CN, c, L);
        if (EMIT == 2 && SPB == 1) send(c, t);
        if (EMIT == 2 && SPB == 2)
            pieces(c, L, [&](int k, int, bool, float *(&e)[VW]) {
                put(waiting + (((t & 1) * 2 + sub) * PIECES + k) * TH + L.tid, e);
            });
        EACH AT(c) = 0.f;
        if (FAITHFUL) EACH AT(m) = 0.f;
    };
    // After the barrier: the deltas of step t go to memory; two samples with one row are added
    // up first.
    auto emit = [&](int t) {
        if (EMIT != 2 || SPB != 2) return;
        const Piece *first = waiting + (t & 1) * 2 * PIECES * TH;
        const bool same = row < 0 && row == mate;
        if (same && sub) return;
        Acc d;
        ring_add(d, first + sub * PIECES * TH, false, L);
        if (same) ring_add(d, first + PIECES * TH, true, L);
        send(d, t);
    };

// --- section: backward_u
    // dU[co][ci][tap] += sum over neurons of delta[co][x] * h[ci][x+tap-1]; the neurons are
    // the inner dimension
    auto grad_u = [&](int t) {
        if (STUB) return;
        const u32 st = smem(ring + t % RING * STAGE);
        // terms of delta used; channel tiles in hand at a time
        constexpr int DT = NT - 1, PQ = CQ % 2 ? CQ : 2;
        u32 d[DT][MT][MC][4];
        UNROLL for (int i = 0; i < DT * MT * MC * 4; i++) {
            const int k = i / (MC * 4) % MT, q = 2 * (i / 4 % MC) + i % 2,
                      s = 2 * k + i / 2 % 2, dk = i / (MT * MC * 4);
            d[dk][k][q / 2][i % 4] = q < CQ ? transpose8(a[dk][s][q < CQ ? q : 0]) : 0;
        }
        UNROLL for (int q0 = 0; q0 < CQ; q0 += PQ) {
            u32 h0[HTERMS][MT * PQ][2], h1[HTERMS][(MT + 1) * PQ][2];
            UNROLL for (int hk = 0; hk < HTERMS; hk++) {
                u32 v[4];
                UNROLL for (int i = 0; i < (MT * PQ + 1) / 2; i++) {
                    ldmatrix<true>(v, st + hk * TILE * 4 +
                                          at0[CQ % 2 ? i : i * (CQ / 2) + q0 / 2]);
                    UNROLL for (int e = 0; e < 4; e++)
                        if (2 * i + e / 2 < MT * PQ) h0[hk][2 * i + e / 2][e % 2] = v[e];
                }
                UNROLL for (int i = 0; i < ((MT + 1) * PQ + 1) / 2; i++) {
                    ldmatrix<true>(v, st + hk * TILE * 4 +
                                          at1[CQ % 2 ? i : i * (CQ / 2) + q0 / 2]);
                    UNROLL for (int e = 0; e < 4; e++)
                        if (2 * i + e / 2 < (MT + 1) * PQ) h1[hk][2 * i + e / 2][e % 2] = v[e];
                }
            }
            UNROLL for (int mt = 0; mt < MC; mt++) {
                float part[3][PQ][4] = {}; // faithful: one step apart, added up in fp32
                UNROLL for (int hk = 0; hk < HTERMS; hk++)
                    UNROLL for (int dk = 0; dk < DT - (hk > 0); dk++)
                        UNROLL for (int k = 0; k < MT; k++)
                            UNROLL for (int n = 0; n < PQ; n++)
                                UNROLL for (int tap = 0; tap < 3; tap++) {
                                    const u32(&h)[2] = tap == 1
                                                           ? h0[hk][k * PQ + n]
                                                           : h1[hk][(k + tap / 2) * PQ + n];
                                    const u32(&e)[4] = d[dk][k][mt];
                                    mma(FAITHFUL ? part[tap][n] : dw[tap][mt][q0 + n], e[0],
                                        e[1], e[2], e[3], h[0], h[1]);
                                }
                if (FAITHFUL)
                    UNROLL for (int i = 0; i < 3 * PQ * 4; i++)
                        dw[i / (PQ * 4)][mt][q0 + i / 4 % PQ][i % 4] +=
                            part[i / (PQ * 4)][i / 4 % PQ][i % 4];
            }
        }
    };

// --- section: backward_loop
    __syncthreads(); // ring_zero and sums before the copies
    if (FED)
        for (int k = 0; k < 2; k++) feed_fetch(feed, x, rows, (T - 1) / 32 - k, p.B, T, L);
    for (int t = T; t > T - RING; t--) fetch(t);
    load(c, STATES ? nullptr : p.gy + rb * CN, L);
    copy_wait<0>();
    __syncthreads();
    delta(T - 1);
    put_edges(eb, a, L);
    conv<false>(mm, c, a, E, w, wsm, L);
    // finish dL/dh[t] from delta[t]; dU of step t. Reads h[t] only, so the place of h[t+1] is
    // free after the barrier.
    auto body = [&](int t) {
        __syncthreads();
        fetch(t + 1 - RING);
        if (FED && t % 32 == 31) feed_fetch(feed, x, rows, t / 32 - 1, p.B, T, L);
        emit(t);
        get_edges(E, eb + ((T - 1 - t) & 1) * 2 * EV * TH, L);
        conv<true>(mm, c, a, E, w, wsm, L);
        grad_u(t);
        if (FAITHFUL) EACH AT(c) += AT(m);
    };
#pragma unroll 1
    for (int t = T - 1; t > 0; t--) {
        body(t);
        delta(t - 1);
        put_edges(eb + ((T - t) & 1) * 2 * EV * TH, a, L);
        conv<false>(mm, c, a, E, w, wsm, L);
        copy_wait<RING - 2>(); // h[t-1] is here before the next barrier
    }
    body(0);
    store(p.dh0 + rb * CN, c, L);

// --- section: backward_out
    // The sums go out
    float4 *pV = (float4 *)p.pV;
    if (F && !SUMS) {
        pV += blk * (F + 1) * VALS * TH + L.tid;
        UNROLL for (int i = 0; i < VALS; i++) {
            const float(&d)[4] = db[i / CQ][i % CQ];
            pV[(F * VALS + i) * TH] = make_float4(d[0], d[1], d[2], d[3]);
            UNROLL for (int f = 0; f < F; f++) {
                const float(&e)[4] = dV[f][i / CQ][i % CQ];
                pV[(f * VALS + i) * TH] = make_float4(e[0], e[1], e[2], e[3]);
            }
        }
    }
    if (SUMS) {
        const i64 K = F ? F + 1 : p.rows;
        for (int i = L.tid; i < K * VALS * TH; i += TH) pV[blk * K * VALS * TH + i] = sums[i];
    }
    copy_wait<0>();
    float *red = (float *)rings; // [3][16*MC][8*CQ], warps one after the other
    for (int k = 0; k < W * SPB; k++) {
        __syncthreads();
        if (threadIdx.x / 32 == k)
            UNROLL for (int i = 0; i < 3 * MC * CQ * 4; i++) {
                const int tap = i / (MC * CQ * 4), mt = i / (CQ * 4) % MC, n = i / 4 % CQ,
                          e = i % 4;
                const int co = 16 * mt + L.g + (e >> 1) * 8, ci = 8 * n + 2 * L.q4 + (e & 1);
                float *o = red + (tap * 16 * MC + co) * 8 * CQ + ci;
                *o = (k ? *o : 0.f) + dw[tap][mt][n][e];
            }
    }
    __syncthreads();
    float *pU = p.pU + blk * C * C * 3;
    for (int i = threadIdx.x; i < C * C * 3; i += TH * SPB)
        pU[i] = red[(i % 3 * 16 * MC + i / 3 / C) * 8 * CQ + i / 3 % C];
}

// --- section: batch_sums
// part [R][B][K][VALS][TH] float4 -> the first K-1 (or, db null, all) to dV [R][C][N][K']
// (table: [R][K][C][N]), the last to db [R][C][N].
// grid (ceil(VALS*TH*4/64), K, R), block (64, 4)
extern "C" __global__ void sum_fragments(const float *part, float *dV, float *db, i64 B) {
    __shared__ float s[4][64];
    const int e = blockIdx.x * 64 + threadIdx.x, K = gridDim.y, k = blockIdx.y,
              E = VALS * TH * 4;
    const i64 r = blockIdx.z;
    float v = 0.f;
    if (e < E) {
#pragma unroll 8
        for (i64 b = threadIdx.y; b < B; b += 4) v += part[((r * B + b) * K + k) * E + e];
    }
    s[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.y || e >= E) return;
    v = s[0][threadIdx.x] + s[1][threadIdx.x] + s[2][threadIdx.x] + s[3][threadIdx.x];
    const int i = e & 3, tid = e / 4 % TH, f = e / 4 / TH, slot = f / CQ + (i >> 1) * MT,
              n = tid / 4 * SL + slot;
    const int ch = 8 * (f % CQ) + 2 * (tid & 3) + (i & 1);
    if (n >= N || ch >= C) return;
    if (!db) dV[(r * K + k) * CN + ch * N + n] = v;
    else if (k == K - 1) db[r * CN + ch * N + n] = v;
    else dV[(r * CN + ch * N + n) * (K - 1) + k] = v;
}
// part [R][B][E] -> out [R][E]; grid (ceil(E/64), 1, R), block (64, 4)
extern "C" __global__ void sum_samples(const float *part, float *out, i64 B, i64 E) {
    __shared__ float s[4][64];
    const i64 e = blockIdx.x * 64 + threadIdx.x;
    float v = 0.f;
    if (e < E) {
#pragma unroll 8
        for (i64 b = threadIdx.y; b < B; b += 4) v += part[(blockIdx.z * B + b) * E + e];
    }
    s[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.y == 0 && e < E)
        out[blockIdx.z * E + e] = s[0][threadIdx.x] + s[1][threadIdx.x] + s[2][threadIdx.x] +
                                  s[3][threadIdx.x];
}

// --- section: row_sums
DEVICE void get_store(float (&v)[VW], const Store *from) {
    UNROLL for (int s = 0; s < VW; s++) v[s] = 0.f;
    if (!from) return;
    if constexpr (FAITHFUL) {
        const Piece x = *(const Piece *)from;
        UNROLL for (int s = 0; s < VW; s++) v[s] = ((const float *)&x)[s];
    } else if constexpr (VW == 1) {
        v[0] = __uint_as_float((u32) * (const unsigned short *)from << 16);
    } else {
        UNROLL for (int s = 0; s < VW; s += 2) {
            const u32 x = ((const u32 *)from)[s / 2];
            v[s] = low(x), v[s + 1] = high(x);
        }
    }
}
// D [R][T*B][C][N] -> dtable [R][rows][C][N] for rows used more than once or never, in the
// order of `order` (deterministic). grid (rows, ceil(CN/(256*VW)), R), block 256
extern "C" __global__ void sum_rows(const Store *D, const i64 *place, const i64 *order,
                                    const i64 *offsets, float *dtable, i64 TB, i64 rows,
                                    i64 many) {
    const i64 k = blockIdx.x, r = blockIdx.z, z = many ? r : 0;
    const i64 from = offsets[z * (rows + 1) + k], to = offsets[z * (rows + 1) + k + 1];
    const i64 at = ((i64)blockIdx.y * 256 + threadIdx.x) * VW;
    if (to - from == 1 || at >= CN) return;
    float sum[VW] = {};
    for (i64 i = from; i < to; i += 8) { // eight loads in flight
        float v[8][VW];
        UNROLL for (int j = 0; j < 8; j++) {
            i64 pos = i + j < to ? order[z * TB + i + j] : -1;
            // is in its mate's place
            if (SPB == 2 && pos > 0 && pos % 2 &&
                place[z * TB + pos] == place[z * TB + pos - 1])
                pos = -1;
            get_store(v[j], pos < 0 ? nullptr : D + (r * TB + pos) * CN + at);
        }
        UNROLL for (int j = 0; j < 8; j++)
            UNROLL for (int s = 0; s < VW; s++) sum[s] += v[j][s];
    }
    UNROLL for (int s = 0; s < VW; s++) dtable[(r * rows + k) * CN + at + s] = sum[s];
}
#endif

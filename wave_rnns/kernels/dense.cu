// The dense recurrence, both ways, and the gradient of U. All sizes are macros.
// 04_kernels_dense.ipynb explains each section.

// --- section: layout
// 16-unit tiles of a state; of the rows one block owns
constexpr int KT = PAD / 16, BM = KT / CLUSTER;
// warps along rows and along columns
constexpr int WM = BM / ROWS, WK = KT / DEEP, THREADS = 32 * WM * WK;
constexpr int STATE = PAD * 8; // floats of a state: [KT][8 samples][16 units]
constexpr int ITEMS = BM * 32; // groups of 4 results a block makes per step and tile
// A crew is a set of threads; crews take turns in finishing tiles.
constexpr int CREWS = THREADS % ITEMS ? 1 : THREADS / ITEMS;
constexpr int OWN = TILES > CREWS ? TILES / CREWS : 1; // tiles a crew finishes
constexpr int STREAMS = BACK ? !LAST + (ACT != 0) : 1; // arrays read at every step
static_assert(BM % ROWS == 0 && ROWS % 2 == 0 && KT % DEEP == 0 && KT % CLUSTER == 0, "tiles");
static_assert(THREADS >= ITEMS && (TILES <= CREWS || TILES % CREWS == 0), "crews");

struct Lane {
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, q = lane & 3,
        wm = warp % WM, wk = warp / WM;
    int rank = blockIdx.x % CLUSTER;
    // the 4 results this thread finishes
    int crew = tid / ITEMS, item = tid % ITEMS, sample = 2 * q + (item >> 5 & 1);
    int unit = rank * BM * 16 + (item >> 6) * 32 + 4 * g, have = M - unit;
    DEVICE bool finishes(int s) const { return crew < CREWS && s % CREWS == crew; }
};

// --- section: terms
template <int N> DEVICE void split(u32 (&d)[N], float x, float y) { // N bf16 terms each
    UNROLL for (int k = 0; k < N; k++) d[k] = pack(x, y), x -= low(d[k]), y -= high(d[k]);
}
DEVICE void split_state(u32 (&d)[TERMS], float x, float y, float grid) {
    if constexpr (TERMS == 3) {
        const float hx = (x + grid) - grid, hy = (y + grid) - grid;
        u32 rest[2];
        split(rest, x - hx, y - hy);
        d[0] = __byte_perm(__float_as_uint(hx), __float_as_uint(hy), 0x7632);
        d[1] = rest[0], d[2] = rest[1];
    } else split(d, x, y);
}
DEVICE void split_weight(u32 (&d)[TERMS], float x, float y, float grid) {
    if constexpr (TERMS == 3) {
        u32 rest[2];
        d[0] = pack((x + grid) - grid, (y + grid) - grid);
        split(rest, x - low(d[0]), y - high(d[0]));
        d[1] = rest[0], d[2] = rest[1];
    } else split(d, x, y);
}

// --- section: rows
// Four neighbours of a row, of which the first `have` exist; the others read as 0 and are not
// written.
DEVICE void load4(float (&v)[4], const float *p, int have) {
    if (M % 4 == 0) {
        const float4 x = have > 0 ? *(const float4 *)p : make_float4(0, 0, 0, 0);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
        UNROLL for (int i = 0; i < 4; i++) v[i] = i < have ? p[i] : 0.f;
    }
}
DEVICE void store4(float *p, const float (&v)[4], int have) {
    if (M % 4 == 0) {
        if (have > 0)
            asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" :: "l"(p), "f"(v[0]),
                         "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
    } else {
        UNROLL for (int i = 0; i < 4; i++)
            if (i < have) p[i] = v[i];
    }
}
DEVICE void copy4(float4 *to, const float *from, int have) { // the same, in the background
    if (M % 4 == 0) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(smem(to)),
                     "l"(from), "r"(have > 0 ? 16 : 0) : "memory");
    } else {
        UNROLL for (int i = 0; i < 4; i++)
            asm volatile(
                "cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(smem(to) + 4 * i),
                "l"(i < have ? from + i : from), "r"(i < have ? 4 : 0) : "memory");
    }
}

// --- section: cluster
#if CLUSTER > 1
DEVICE u32 peer(u32 at, u32 rank) {
    u32 d;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(at), "r"(rank));
    return d;
}
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\t"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void mbarrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier),
                 "r"(bytes) : "memory");
}
DEVICE void mbarrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
                 "fence.mbarrier_init.release.cluster;" :: "r"(barrier) : "memory");
    mbarrier_expect(barrier, 4 * STATE);
}
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}
// 16 bytes into the same place of every block, whose mbarrier counts them
DEVICE void send(u32 to, u32 barrier, const float (&v)[4], u32 rank) {
    UNROLL for (u32 i = 1; i <= CLUSTER; i++) {
        const u32 r = (rank + i) % CLUSTER, at = peer(to, r);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                     "[%0], {%1,%2,%3,%4}, [%5];" :: "r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                     "f"(v[3]), "r"(peer(barrier, r)) : "memory");
    }
}
#else
DEVICE void cluster_barrier() { __syncthreads(); }
DEVICE void mbarrier_expect(u32, u32) {}
DEVICE void mbarrier_init(u32) {}
DEVICE void mbarrier_wait(u32, u32) {}
DEVICE void send(u32 to, u32, const float (&v)[4], u32) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" :: "r"(to), "f"(v[0]), "f"(v[1]),
                 "f"(v[2]), "f"(v[3]) : "memory");
}
#endif

// --- section: weights
// [term][pair of row tiles][tile of the pair][column tile]
using Weights = u32[TERMS][ROWS / 2][2][DEEP][4];

// v[a][b] = matrix element (4g + a of row pair `pr`, 4q + b of column tile `kt`); the matrix
// is U, or backward its transpose
DEVICE void patch(float (&v)[4][4], const float *U, int pr, int kt, const Lane &L) {
    const int o = (L.rank * BM + L.wm * ROWS + 2 * pr) * 16 + 4 * L.g,
              k = (L.wk * DEEP + kt) * 16 + 4 * L.q;
    UNROLL for (int a = 0; a < 4; a++) {
        float x[4];
        if (BACK) load4(x, U + (i64)(k + a) * M + o, k + a < M ? M - o : 0);
        else load4(x, U + (i64)(o + a) * M + k, o + a < M ? M - k : 0);
        UNROLL for (int b = 0; b < 4; b++) (BACK ? v[b][a] : v[a][b]) = x[b];
    }
}
DEVICE void load_weights(Weights &w, const float *U, u32 *top, const Lane &L) {
    UNROLL for (int pr = 0; pr < ROWS / 2; pr++) // the largest element of every row
        UNROLL for (int kt = 0; kt < DEEP; kt++) {
            float v[4][4];
            patch(v, U, pr, kt, L);
            UNROLL for (int a = 0; a < 4; a++) {
                const float m = fmaxf(fmaxf(fabsf(v[a][0]), fabsf(v[a][1])),
                                      fmaxf(fabsf(v[a][2]), fabsf(v[a][3])));
                atomicMax(top + (L.wm * ROWS + 2 * pr) * 16 + 4 * L.g + a, __float_as_uint(m));
            }
        }
    __syncthreads();
    UNROLL for (int pr = 0; pr < ROWS / 2; pr++)
        UNROLL for (int kt = 0; kt < DEEP; kt++) {
            float v[4][4];
            patch(v, U, pr, kt, L);
            // rows g and g + 8 of tile j are 4g + 2j and 4g + 2j + 1 of the pair
            UNROLL for (int i = 0; i < 8; i++) {
                const int j = i / 4, a = 2 * j + i % 2, b = i / 2 % 2 * 2;
                u32 d[TERMS];
                split_weight(
                    d, v[a][b], v[a][b + 1],
                    grid_above(top[(L.wm * ROWS + 2 * pr) * 16 + 4 * L.g + a], WBITS));
                UNROLL for (int k = 0; k < TERMS; k++) w[k][pr][j][kt][i % 4] = d[k];
            }
        }
}

// --- section: product
// This warp's columns of the matrix times the state of one tile: a share of the sum for each
// of its rows
DEVICE void product(float4 *share, const Weights &w, const float4 *h, const Lane &L) {
    // sums of small products: two where registers allow it
    constexpr int SMALL = ROWS == 2 ? 2 : 1;
    float acc[1 + SMALL][ROWS][4] = {};
    UNROLL for (int kt = 0; kt < DEEP; kt++) {
        const float4 v = h[(L.wk * DEEP + kt) * 32 + L.lane];
        u32 b0[TERMS], b1[TERMS];
        const float grid = grid_above(__float_as_uint(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)),
                                                            fmaxf(fabsf(v.z), fabsf(v.w)))),
                                      SBITS);
        split_state(b0, v.x, v.y, grid);
        split_state(b1, v.z, v.w, grid);
        // large products first, those of like size in turn
        UNROLL for (int d = 0; d < DIAGONALS; d++)
            UNROLL for (int kw = 0; kw <= d; kw++) {
                if (kw >= TERMS || d - kw >= TERMS || STUB) continue;
                UNROLL for (int j = 0; j < ROWS; j++)
                    mma(acc[min(d, SMALL)][j], w[kw % TERMS][j / 2][j % 2][kt],
                        b0[(d - kw) % TERMS], b1[(d - kw) % TERMS]);
            }
    }
    UNROLL for (int j = 0; j < ROWS; j++)
        UNROLL for (int i = 0; i < SMALL * 4; i++)
            acc[0][j][i % 4] += acc[1 + i / 4][j][i % 4];
    share += L.wk * ITEMS + L.wm * ROWS * 32 + L.lane;
    UNROLL for (int j = 0; j < ROWS; j += 2) { // units 4g .. 4g+3 of samples 2q and 2q+1
        const float(&x)[4] = acc[0][j], (&y)[4] = acc[0][j + 1];
        share[j * 32] = make_float4(x[0], x[2], y[0], y[2]);
        share[j * 32 + 32] = make_float4(x[1], x[3], y[1], y[3]);
    }
}

// --- section: scan_setup
// forward:  in = drive, first = h_0 or null, out = every state or null, end = h_T or null
// backward: in = dL/dh_t (or, LAST, only that of h_T), y = every state, out = delta,
//           end = dL/dh_0
struct Scan {
    const float *U, *in, *y, *first;
    float *out, *end;
    i64 B, T;
};

#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    dense_scan(const Scan p) {
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_scan(const Scan p) {
#endif
    extern __shared__ float4 pool[];
    __shared__ u32 top[BM * 16];
    __shared__ alignas(8) unsigned long long barriers[2 * TILES];
    float *h = (float *)pool;                     // [TILES][2][STATE]
    float4 *share = pool + TILES * 2 * STATE / 4; // [TILES][WK][ITEMS]
    float4 *ring = share + TILES * WK * ITEMS;    // [AHEAD][TILES][STREAMS][ITEMS]
    Lane L;
    asm volatile("" : "+r"(L.tid), "+r"(L.rank));
    const int B = (int)p.B, T = (int)p.T, b0 = blockIdx.x / CLUSTER * 8 * TILES,
              r = blockIdx.y, steps = BACK ? T + 1 : T;
    const i64 step = p.B * M, run = r * p.T * step;

    for (int i = L.tid; i < BM * 16; i += THREADS) top[i] = 0;
    for (int i = L.tid; i < TILES * STATE; i += THREADS) { // state 0: h_0 or zero
        const int s = i / STATE, e = i % STATE, k = e / 128 * 16 + e % 16,
                  b = b0 + s * 8 + e / 16 % 8;
        h[2 * s * STATE + e] = !BACK && p.first && k < M && b < B
                                   ? p.first[r * step + (i64)b * M + k]
                                   : 0.f;
    }
    if (L.tid < 2 * TILES) mbarrier_init(smem(barriers + L.tid));
    __syncthreads();
    Weights w;
    load_weights(w, p.U + (i64)r * M * M, top, L);

// --- section: scan_inputs
    // said to be unknown, or the compiler asks for the base at every step
    u32 h_at = smem(h), barriers_at = smem(barriers);
    asm volatile("" : "+r"(h_at), "+r"(barriers_at));
    const i64 place = (i64)(b0 + L.sample) * M + L.unit, stride = BACK ? -step : step;
    // what the next fetch reads; AHEAD steps before it, where results go
    i64 at = run + (BACK ? (T - 1) * step : 0) + place;
    // ... and its place in a state
    const int mine = (L.unit / 16 * 8 + L.sample) * 16 + L.unit % 16;
    auto exists = [&](int s) { return b0 + s * 8 + L.sample < B ? L.have : 0; };
    auto input = [&](int i, int s) {
        return ring + ((i % AHEAD * TILES + s) * STREAMS) * ITEMS + L.item;
    };
    auto fetch = [&](int i, int s) { // what step i reads, on its way
        const int n = i < T ? exists(s) : 0;
        if (!BACK || !LAST) copy4(input(i, s), n > 0 ? p.in + at + s * 8 * M : p.U, n);
        if (BACK && ACT)
            copy4(input(i, s) + (STREAMS - 1) * ITEMS, n > 0 ? p.y + at + s * 8 * M : p.U, n);
        copy_commit();
    };
    for (int i = 0; i < AHEAD; i++, at += stride)
        for (int s = 0; s < TILES; s++)
            if (STREAMS && L.finishes(s)) fetch(i, s);

// --- section: scan_step
    // sum of the shares, input, activation; the new state goes out
    auto finish = [&](int i, int s) {
        float v[4] = {};
        UNROLL for (int k = 0; k < WK; k++) {
            const float4 x = share[(s * WK + k) * ITEMS + L.item];
            v[0] += x.x, v[1] += x.y, v[2] += x.z, v[3] += x.w;
        }
        const int n = exists(s);
        if (BACK && i == T) {
            store4(p.end + r * step + place + s * 8 * M, v, n);
            return;
        }
        if (STREAMS) copy_wait<AHEAD * OWN - 1>();
        float x[4] = {}, z[4];
        if (!BACK || !LAST) load4(x, (float *)input(i, s), 4);
        else if (i == 0) load4(x, p.in + r * step + place + s * 8 * M, n);
        if (BACK && ACT) load4(z, (float *)(input(i, s) + (STREAMS - 1) * ITEMS), 4);
        UNROLL for (int k = 0; k < 4; k++) {
            v[k] += x[k];
            if (!BACK) v[k] = act(v[k]);
            else if (ACT == 1) v[k] = z[k] <= 0.f ? 0.f : v[k];
            else if (ACT == 2) v[k] *= 1.f - z[k] * z[k];
        }
        const int other = 2 * s + (~i & 1);
        if (i + 1 < steps)
            send(h_at + 4 * (other * STATE + mine), barriers_at + 8 * other, v, L.rank);
        if (p.out) store4(p.out + at - AHEAD * stride + s * 8 * M, v, n);
        if (!BACK && p.end && i == T - 1) store4(p.end + r * step + place + s * 8 * M, v, n);
        if (STREAMS) fetch(i + AHEAD, s);
    };

// --- section: scan_loop
    cluster_barrier();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
#pragma unroll 1
        for (int s = 0; s < TILES; s++) {
            const int now = 2 * s + (i & 1);
            if (CLUSTER > 1 && i) {
                mbarrier_wait(barriers_at + 8 * now, (i - 1 >> 1) & 1);
                if (L.tid == 0) mbarrier_expect(barriers_at + 8 * now, 4 * STATE);
            }
            product(share + s * WK * ITEMS, w, (const float4 *)(h + now * STATE), L);
            __syncthreads();
            if (L.finishes(s)) finish(i, s);
            // with more tiles, the next one's barrier does it
            if (CLUSTER == 1 && TILES == 1) __syncthreads();
        }
        at += stride;
    }
    copy_wait<0>();
    // nobody leaves while a neighbour may still write to it
    if (CLUSTER > 1) cluster_barrier();
}

// --- section: outer_setup
#if BACK
constexpr int EDGE = 128, LINE = EDGE + 8, ROUND = 32, STAGES = OUTER_STAGES, FLUSH = 4;
struct Outer {
    const float *delta, *h, *first;
    float *part;
    i64 B, K, chunk;
};

// part[o][i] = sum over rows k of one chunk of delta[k][o] h[k - B][i]; the first B rows of
// delta meet h_0
extern "C" __global__ void __launch_bounds__(256, 1) dense_outer(const Outer p) {
    extern __shared__ float4 pool[]; // [STAGES][2 operands][ROUND][LINE]
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, q = lane & 3,
              wo = warp % 2, wi = warp / 2;
    constexpr int SIDE = (M + EDGE - 1) / EDGE;
    const int o0 = blockIdx.x / SIDE * EDGE, i0 = blockIdx.x % SIDE * EDGE;
    const i64 r = blockIdx.z, k0 = blockIdx.y * p.chunk;
    const int rows = (int)min(p.chunk, p.K - k0),
              early = (int)max(min(p.B - k0, (i64)rows), (i64)0),
              rounds = (rows + ROUND - 1) / ROUND;
    const float *delta = p.delta + (r * p.K + k0) * M, *h = p.h + (r * p.K + k0 - p.B) * M,
                *first = p.first + (r * p.B + k0) * M;
    auto stage = [&](int n, int operand) {
        return (float *)pool + (n % STAGES * 2 + operand) * ROUND * LINE;
    };
    // a row of 128: 16 bytes a lane, or neighbours by neighbouring lanes
    auto bring = [&](float *to, const float *from, int have) {
        if (M % 4 == 0)
            copy4((float4 *)(to + 4 * lane), have > 4 * lane ? from + 4 * lane : p.delta,
                  have - 4 * lane);
        else
            UNROLL for (int c = lane; c < EDGE; c += 32)
                asm volatile(
                    "cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(smem(to + c)),
                    "l"(c < have ? from + c : p.delta), "r"(c < have ? 4 : 0) : "memory");
    };
    auto fetch = [&](int n) {
        if (n < rounds)
            // a warp brings one row of either operand at a time
            UNROLL for (int x = 0; x < ROUND / 8; x++) {
                const int row = 8 * x + warp, k = n * ROUND + row, have = k < rows ? M : 0,
                          have_h = k >= early || p.first ? have : 0;
                bring(stage(n, 0) + row * LINE, delta + k * M + o0, have - o0);
                bring(stage(n, 1) + row * LINE, (k < early ? first : h) + k * M + i0,
                      have_h - i0);
            }
        copy_commit();
    };

// --- section: outer_sum
    float acc[4][4][4] = {}, sum[4][4][4] = {};
    for (int n = 0; n < STAGES - 1; n++) fetch(n);
#pragma unroll 1
    for (int n = 0; n < rounds; n++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(n + STAGES - 1);
        UNROLL for (int k0 = 0; k0 < ROUND; k0 += 16) {
            float v[4][4]; // rows q, q+4, q+8, q+12 of 16, 4 neighbouring columns
            auto look = [&](int operand, int col) {
                UNROLL for (int k = 0; k < 4; k++) {
                    const float4 x = *(const float4 *)(stage(n, operand) +
                                                       (k0 + q + 4 * k) * LINE + col + 4 * g);
                    v[k][0] = x.x, v[k][1] = x.y, v[k][2] = x.z, v[k][3] = x.w;
                }
            };
            u32 b[4][2][OUTER_TERMS];
            look(1, wi * 32);
            UNROLL for (int c = 0; c < 8; c++)
                split(b[c / 2][c % 2], v[c % 2 * 2][c / 2], v[c % 2 * 2 + 1][c / 2]);
            UNROLL for (int pr = 0; pr < 2; pr++) {
                look(0, wo * 64 + pr * 32);
                UNROLL for (int j = 0; j < 2; j++) {
                    u32 a[OUTER_TERMS][4];
                    UNROLL for (int i = 0; i < 4; i++) {
                        u32 d[OUTER_TERMS];
                        split(d, v[i / 2 * 2][2 * j + i % 2], v[i / 2 * 2 + 1][2 * j + i % 2]);
                        UNROLL for (int k = 0; k < OUTER_TERMS; k++) a[k][i] = d[k];
                    }
                    UNROLL for (int ka = OUTER_TERMS - 1; ka >= 0; ka--)
                        UNROLL for (int kb = OUTER_TERMS - 1 - ka; kb >= 0; kb--)
                            UNROLL for (int c = 0; c < 4; c++)
                                mma(acc[pr * 2 + j][c], a[ka], b[c][0][kb], b[c][1][kb]);
                }
            }
        }
        // the unit truncates its sums: keep its chains short
        if (n % FLUSH == FLUSH - 1 || n == rounds - 1)
            UNROLL for (int i = 0; i < 64; i++) {
                float &x = acc[i / 16][i / 4 % 4][i % 4];
                sum[i / 16][i / 4 % 4][i % 4] += x, x = 0.f;
            }
    }
    copy_wait<0>();
    float *out = p.part + (r * gridDim.y + blockIdx.y) * M * M;
    // row tile e / 4; of it row g or g + 8, columns 8q or 8q + 4
    UNROLL for (int e = 0; e < 16; e++) {
        const int o = o0 + wo * 64 + e / 8 * 32 + 4 * g + e / 4 % 2 * 2 + e % 4 / 2,
                  i = i0 + wi * 32 + 8 * q + e % 2 * 4;
        const float v[4] = {sum[e / 4][0][e % 4], sum[e / 4][1][e % 4], sum[e / 4][2][e % 4],
                            sum[e / 4][3][e % 4]};
        if (o < M) store4(out + (i64)o * M + i, v, M - i);
    }
}

// --- section: outer_pieces
// part [R][pieces][M*M] -> out [R][M*M], always in the same order
extern "C" __global__ void dense_sum(const float *part, float *out, i64 pieces) {
    const i64 E = M * M, e = blockIdx.x * 256 + threadIdx.x;
    if (e >= E) return;
    float v = 0.f;
#pragma unroll 8
    for (i64 s = 0; s < pieces; s++) v += part[(blockIdx.y * pieces + s) * E + e];
    out[blockIdx.y * E + e] = v;
}
#endif

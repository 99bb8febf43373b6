// What the kernels of this project share. ACT: 0 identity, 1 relu, 2 tanh.

// --- section: numbers
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
using u32 = unsigned int;
using i64 = long long;

DEVICE u32 pack(float lo, float hi) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
DEVICE float low(u32 p) { return __uint_as_float(p << 16); }
DEVICE float high(u32 p) { return __uint_as_float(p & 0xffff0000u); }
// Adding this number and taking it away rounds to multiples of 2^-bits of the power of two
// above `top`.
DEVICE float grid_above(u32 top, int bits) {
    return __uint_as_float(min((top >> 23) + 24 - bits, 250u) << 23 | 0x400000u);
}

// --- section: arithmetic
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma(d, a[0], a[1], a[2], a[3], b0, b1);
}
DEVICE float act(float v) {
    // NaN must not vanish
    if (ACT == 1) {
        float d;
        asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(d) : "f"(v));
        return d;
    }
    if (ACT == 2) return tanhf(v);
    return v;
}

// --- section: copies
DEVICE u32 smem(const void *p) { return (u32)__cvta_generic_to_shared(p); }
template <int BYTES, bool CACHE> DEVICE void copy_async(u32 to, const void *from) {
    if constexpr (BYTES == 16 && CACHE)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from)
                     : "memory");
    else if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(to), "l"(from),
                     "n"(BYTES) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int K> DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(K) : "memory");
}

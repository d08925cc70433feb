/* Rounding with feedback of the errors. Nothing is reassociated by the compiler and WebAssembly has one arithmetic: the
 * same input gives the same codes on every machine.
 */
#include <wasm_simd128.h>

#include "rans.h"

#define GROUP 4u

/* `strips` of four columns each of a lower triangular `matrix` (m, m), which `feedback` reads in this order. Both
 * are m·m doubles, the strips with m rounded up to a multiple of four in the second. */
void EXPORT(strips)(double* strips, const double* matrix, u32 m) {
    for (u32 left = 0; left < m; left += GROUP)
        for (u32 k = 0; k < m; k++)
            for (u32 r = 0; r < GROUP; r++) *strips++ = left + r < m ? matrix[(size_t)k * m + left + r] : 0;
}

/* sums (4, width) = Σ over rows k from m − 1 down to `first` of strip[k]ᵀ · known[k], four columns at a time. */
static void later_rows(double* sums, const double* strip, const double* known, u32 m, u32 first,
                       u32 width) {
    for (u32 left = 0; left < width; left += GROUP, known += (size_t)m * GROUP) {
        v128_t s[8];
        for (int r = 0; r < 8; r++) s[r] = wasm_f64x2_splat(0);
        for (u32 k = m; k-- > first;) {
            const double *const factors = strip + (size_t)k * GROUP, *const row = known + (size_t)k * GROUP;
            v128_t const a = wasm_v128_load(row), b = wasm_v128_load(row + 2);
#pragma clang loop unroll(full)
            for (int r = 0; r < 4; r++) {
                v128_t const factor = wasm_v128_load64_splat(factors + r);
                s[2 * r] = wasm_f64x2_add(s[2 * r], wasm_f64x2_mul(factor, a));
                s[2 * r + 1] = wasm_f64x2_add(s[2 * r + 1], wasm_f64x2_mul(factor, b));
            }
        }
        for (int r = 0; r < 4; r++) {
            wasm_v128_store(sums + (size_t)r * width + left, s[2 * r]);
            wasm_v128_store(sums + (size_t)r * width + left + 2, s[2 * r + 1]);
        }
    }
}

/* Prices of magnitudes, those of PRICES − 1 and above alike, in squared steps. */
#define PRICES 64u

INLINE double price_of(const double* prices, i32 magnitude) {
    return prices[magnitude < (i32)PRICES ? magnitude : (i32)PRICES - 1];
}

/* Beyond this codes are too large for any payload. */
#define LARGEST 1e9

/* The code for so many steps: of the two whole numbers around, the one with the least squared distance plus price. */
static i32 nearest(double steps, const double* prices) {
    double const size = __builtin_fabs(steps), below = __builtin_floor(size < LARGEST ? size : LARGEST);
    double const off = size - below, rest = 1 - off;
    i32 code = (i32)below;
    if (rest * rest + price_of(prices, code + 1) <= off * off + price_of(prices, code)) code++;
    return steps < 0 ? -code : code;
}

/* trellis.1: in an even state a code k means 2k steps, in an odd one 2k − sgn(k), and its last bit leads on. */
#define STATES 8u
static const u8 NEXT[STATES][2] = {{0, 2}, {5, 7}, {1, 3}, {6, 4}, {2, 0}, {4, 6}, {3, 1}, {7, 5}};

INLINE double meant(i32 code, u32 state) { return 2.0 * code - (state & 1 ? (code > 0) - (code < 0) : 0); }

/* Each state's best path so far: what its errors are worth in open columns, and how it came there. */
#define WIDEST 64u
#define NEVER 1e300
static double worth[2][STATES][WIDEST];
static i32 chosen[WIDEST][STATES];
static u8 came[WIDEST][STATES];

/* The codes of one row of at most WIDEST columns, by the path through the trellis that costs least: the Viterbi
 * algorithm, where each path takes its own errors back. `open` is what comes from elsewhere, by column. Gives the state
 * that the path ends in. */
static u32 best_path(u32 n, const double* weights, const double* open, const double* sum, const double* lh,
                     double row_step, const double* column_steps, const double* prices, u32 start, i32* codes) {
    double cost[STATES], now[STATES], errors[STATES];
    for (u32 s = 0; s < STATES; s++) {
        cost[s] = s == start ? 0 : NEVER;
        __builtin_memcpy(worth[n & 1][s], open, 8 * n);
    }
    for (u32 j = n; j-- > 0;) {
        double(*const from)[WIDEST] = worth[(j + 1) & 1], (*const to)[WIDEST] = worth[j & 1];
        double const step = row_step * column_steps[j];
        for (u32 s = 0; s < STATES; s++) now[s] = NEVER;
        for (u32 s = 0; s < STATES; s++) {
            if (cost[s] >= NEVER) continue;
            double const steps = (weights[j] - from[s][j] - sum[j]) / step, size = __builtin_fabs(steps);
            i32 const below = (i32)__builtin_floor(((size < LARGEST ? size : LARGEST) + (s & 1)) / 2);
            for (i32 code = below; code <= below + 1; code++) {
                double const off = meant(code, s) - size;
                double const total = cost[s] + off * off + price_of(prices, code);
                u32 const next = NEXT[s][code & 1];
                if (total >= now[next]) continue;
                now[next] = total;
                came[j][next] = (u8)s;
                chosen[j][next] = steps < 0 ? -code : code;
                errors[next] = meant(chosen[j][next], s) * step - weights[j];
            }
        }
        const double* const factors = lh + (size_t)j * n;
        for (u32 s = 0; s < STATES; s++) {
            cost[s] = now[s];
            if (cost[s] >= NEVER) continue;
            const double* const before = from[came[j][s]];
            for (u32 l = 0; l < j; l++) to[s][l] = before[l] + errors[s] * factors[l];
        }
    }
    u32 end = 0;
    for (u32 s = 1; s < STATES; s++)
        if (cost[s] < cost[end]) end = s;
    for (u32 j = 0, s = end; j < n; s = came[j][s], j++) codes[j] = chosen[j][s];
    return end;
}

/* Round `weights` (m, n) to codes, row m − 1 and column n − 1 first; what a weight is off by is taken back where it
 * is still open: to earlier columns by `lh` (n, n), to earlier rows by the strips of LG, both unit lower triangular.
 *
 *     f_ij = later_ij + Σ_{l>j} e_il LH_lj        a_ij = Σ_{k>i} LG_ki (e_kj + f_kj)
 *     code_ij ≈ (w_ij − f_ij − a_ij) / (row_i column_j), e_ij = code_ij row_i column_j − w_ij
 *
 * A code is the one with the least squared distance, in steps, plus its price. With `states` (m), one for each row,
 * which go on in the block before, codes are those of trellis.1, and n is at most WIDEST. `later` (m, n) holds what
 * comes from columns behind these, and is used up. `known` has room for m·width doubles, `sums` for 4·width, width = n
 * rounded up to a multiple of four; `known` is zero at first. */
void EXPORT(feedback)(u32 m, u32 n, const double* weights, double* later, const double* strips,
                      const double* lh, const double* row_steps, const double* column_steps, const double* prices,
                      u8* states, i32* codes, double* errors, double* known, double* sums) {
    u32 const width = (n + GROUP - 1) / GROUP * GROUP;
    for (u32 group = (m + GROUP - 1) / GROUP; group-- > 0;) {
        u32 const first = group * GROUP, end = first + GROUP < m ? first + GROUP : m;
        const double* const strip = strips + (size_t)group * GROUP * m;
        later_rows(sums, strip, known, m, end, width);
        for (u32 i = end; i-- > first;) {
            size_t const at = (size_t)i * n;
            double* const open = later + at;
            const double* const sum = sums + (size_t)(i - first) * width;
            double const row_step = row_steps[i];
            u32 state = 0;
            if (states) {
                state = states[i];
                states[i] = (u8)best_path(n, weights + at, open, sum, lh, row_step, column_steps, prices, state,
                                          codes + at);
            }
            for (u32 j = n; j-- > 0;) {
                double const weight = weights[at + j], f = open[j], step = row_step * column_steps[j];
                if (!states) codes[at + j] = nearest((weight - f - sum[j]) / step, prices);
                i32 const code = codes[at + j];
                double const error = (states ? meant(code, state) : code) * step - weight;
                if (states) state = NEXT[state][code & 1];
                errors[at + j] = error;
                known[((size_t)(j / GROUP) * m + i) * GROUP + j % GROUP] = error + f;
                const double* const factors = lh + (size_t)j * n;
                for (u32 l = 0; l < j; l++) open[l] += error * factors[l];
            }
            for (u32 r = 0; r < i - first; r++) {
                double const factor = strip[(size_t)i * GROUP + r];
                double* const above = sums + (size_t)r * width;
                for (u32 j = 0; j < n; j++)
                    above[j] += factor * known[((size_t)(j / GROUP) * m + i) * GROUP + j % GROUP];
            }
        }
    }
}

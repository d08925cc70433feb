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

/* Round `weights` (m, n) to codes, row m − 1 and column n − 1 first; what a weight is off by is taken back where it
 * is still open: to earlier columns by `lh` (n, n), to earlier rows by the strips of LG, both unit lower triangular.
 *
 *     f_ij = later_ij + Σ_{l>j} e_il LH_lj        a_ij = Σ_{k>i} LG_ki (e_kj + f_kj)
 *     code_ij = round((w_ij − f_ij − a_ij) / (row_i column_j)), e_ij = code_ij row_i column_j − w_ij
 *
 * A fraction of up to ½ + `deadzone` is rounded towards zero. `later` (m, n) holds what comes from columns behind
 * these, and is used up. `known` has room for m·width doubles, `sums` for 4·width, width = n rounded up to a
 * multiple of four; `known` is zero at first. */
void EXPORT(feedback)(u32 m, u32 n, const double* weights, double* later, const double* strips,
                      const double* lh, const double* row_steps, const double* column_steps, double deadzone,
                      i32* codes, double* errors, double* known, double* sums) {
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
            for (u32 j = n; j-- > 0;) {
                double const weight = weights[at + j], f = open[j], step = row_step * column_steps[j];
                double const steps = (weight - f - sum[j]) / step;
                double rounded = __builtin_floor(__builtin_fabs(steps) + 0.5 - deadzone);
                rounded = rounded > 0 ? rounded : 0;
                rounded = rounded < 2147483647.0 ? rounded : 2147483647.0;
                double const code = steps < 0 ? -rounded : rounded, error = code * step - weight;
                codes[at + j] = (i32)code;
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

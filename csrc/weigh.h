// From a Gram matrix to the weights of its paths: one source for host and device, float64 throughout. Equivalent to `weigh` in
// gradalign/reference.py; gradalign/alignment.py says what each method is and where it comes from.
//
// Two paths have closed forms, in registers. More paths are solved by the same iterations as in alignment.py, on arrays that the caller gives:
// on the device in shared memory, since a local array indexed in a loop would lie in the stack.
#pragma once

#include <cmath>

#include "compiler.h"

namespace gradalign {

// In the order of names in csrc/weigh_options.h.
enum class Weighing : int { kMean, kPcgrad, kGradvac, kCagrad, kMgda, kDualproj, kUpgrad, kImtlg, kAlignedmtl, kNashmtl, kCount };

constexpr int kMaxPaths = 8;

struct WeighOptions {
  Weighing method;
  bool always;
  double beta, c;
};

// The same numbers as in alignment.py.
constexpr double kTiny = 1e-300, kCancelled = 1e-6, kMaxTarget = 1.0 - 1e-6, kNothing = 1e-7, kVanishing = 1e-12, kNashRidge = 1e-6, kEndless = 1e-24,
                 kRounding = 2.220446049250313e-16;
constexpr int kNashRounds = 16, kNashSearch = 4, kRoundsPerPath = 3;
// Of one pair after the other, where alignment.py turns disjoint pairs at once.
constexpr int kJacobiSweeps = 12;

GRADALIGN_HD double larger(double a, double b) { return a > b ? a : b; }
GRADALIGN_HD double smaller(double a, double b) { return a < b ? a : b; }
GRADALIGN_HD double root(double a) { return sqrt(larger(a, 0.0)); }
GRADALIGN_HD bool finite(double a) { return fabs(a) <= 1.7976931348623157e308; }

// The t in [-1/2, 1/2] that minimises slope t + k sqrt(alpha t^2 + 2 beta t + gamma).
GRADALIGN_HD double exact_step(double slope, double k, double alpha, double beta, double gamma) {
  alpha = larger(alpha, kTiny);
  const double curvature = k * k * alpha - slope * slope;
  const double delta = larger(gamma - beta * beta / alpha, 0.0);
  double u = 0;
  if (slope != 0) u = curvature > 0 ? smaller(sqrt(slope * slope * delta / larger(alpha * curvature, kTiny)), 1 / kTiny) : 1 / kTiny;
  return smaller(larger((slope > 0 ? -u : u) - beta / alpha, -0.5), 0.5);
}

// How much of path j path i gains when it meets it with this inner product, and the target that is left.
GRADALIGN_HD double pull_up(double norm_i, double norm_j, double inner, double& rho, const WeighOptions& o) {
  const double cosine = norm_i > 0 ? smaller(larger(inner / larger(norm_i * norm_j, kTiny), -1.0), 1.0) : 0.0;
  const double old = rho, target = smaller(old, kMaxTarget);
  const double sine = root(1 - cosine * cosine), target_sine = sqrt(1 - target * target);
  if (o.always || cosine > 0) rho = old + o.beta * (cosine - old);
  if (!(cosine < target && norm_j > 0)) return 0;
  return norm_i * (target * sine - cosine * target_sine) / larger(norm_j * target_sine, kTiny);
}

struct Two {
  double a, b;
};

// w divided by its sum, the mean where that vanishes.
GRADALIGN_HD Two two_of_sum_one(double a, double b) {
  const double sum = a + b;
  return sum > 0 ? Two{a / sum, b / sum} : Two{0.5, 0.5};
}

// Weights of two paths, G = [aa, ab; ab, bb]; rho_ab and rho_ba are GradVac's targets, which it moves.
GRADALIGN_HD Two weigh_two(double aa, double ab, double bb, double& rho_ab, double& rho_ba, const WeighOptions& o) {
  switch (o.method) {
    case Weighing::kPcgrad:
    case Weighing::kUpgrad: {
      const double q = 0.5 * smaller(ab, 0.0);
      return {0.5 - q / larger(aa, kTiny), 0.5 - q / larger(bb, kTiny)};
    }
    case Weighing::kGradvac: {
      const double a = sqrt(aa), b = sqrt(bb);
      const double gain_a = pull_up(a, b, ab, rho_ab, o), gain_b = pull_up(b, a, ab, rho_ba, o);
      return {0.5 + 0.5 * gain_b, 0.5 + 0.5 * gain_a};
    }
    case Weighing::kCagrad:
    case Weighing::kMgda: {
      const bool cagrad = o.method == Weighing::kCagrad;
      const double slope_a = cagrad ? 0.5 * (aa + ab) : 0, slope_b = cagrad ? 0.5 * (ab + bb) : 0;
      const double k = cagrad ? o.c * root(0.25 * (aa + 2 * ab + bb)) : 1;
      const double eps = larger((cagrad ? kCancelled * kCancelled : 1.0) * 0.5 * (aa + bb), kTiny);
      const double product_a = 0.5 * (aa + ab), product_b = 0.5 * (ab + bb);
      const double gamma = larger(0.5 * (product_a + product_b), 0.0) + eps;
      const double t = exact_step(slope_a - slope_b, k, aa + bb - 2 * ab, product_a - product_b, gamma), a = 0.5 + t, b = 0.5 - t;
      if (!cagrad) return {a, b};
      const double ratio = k / sqrt(larger(a * (aa * a + ab * b) + b * (ab * a + bb * b), 0.0) + eps), scale = 1 / (1 + o.c * o.c);
      return {(0.5 + ratio * a) * scale, (0.5 + ratio * b) * scale};
    }
    case Weighing::kDualproj: {
      // At most one path conflicts with the mean.
      const double a = 0.5 * (aa + ab), b = 0.5 * (ab + bb);
      return {0.5 - (a < b ? smaller(a, 0.0) / larger(aa, kTiny) : 0), 0.5 - (a < b ? 0 : smaller(b, 0.0) / larger(bb, kTiny))};
    }
    case Weighing::kImtlg:
    case Weighing::kNashmtl: {
      const double a = root(aa), b = root(bb);
      // A zero gradient is left out; of two, both are kept.
      return a > 0 && b > 0 ? two_of_sum_one(b, a) : two_of_sum_one(a > 0, b > 0);
    }
    case Weighing::kAlignedmtl: {
      // One rotation diagonalises G.
      const double tau = (bb - aa) / (2 * ab);
      const double tangent = ab == 0 ? 0 : (tau < 0 ? -1 : 1) / (fabs(tau) + sqrt(1 + tau * tau));
      const double c = 1 / sqrt(1 + tangent * tangent), s = tangent * c;
      const double one = aa - tangent * ab, two = bb + tangent * ab, cut = kVanishing * larger(larger(one, two), 0.0);
      if (!(one > cut || two > cut)) return {0.5, 0.5};
      const double least = one > cut && two > cut ? smaller(one, two) : larger(one, two);
      const double from_one = one > cut ? sqrt(least / one) * 0.5 * (c - s) : 0, from_two = two > cut ? sqrt(least / two) * 0.5 * (c + s) : 0;
      return {from_one * c + from_two * s, from_two * c - from_one * s};
    }
    default: return {0.5, 0.5};
  }
}

// ------------------------------------------------------------------------------------------------------------------------- more than two

// Numbers of one problem, `stride` apart: neighbouring threads' problems are interleaved, so that they lie in different banks.
struct Numbers {
  double* at;
  int stride;
  GRADALIGN_HD double& operator[](int i) const { return at[i * stride]; }
  GRADALIGN_HD Numbers from(int i) const { return {at + i * stride, stride}; }
};

// Numbers that `weigh_many` needs beside the Gram matrix and the weights.
constexpr int weigh_scratch(int num_paths) { return 2 * num_paths * num_paths + 5 * num_paths; }

// Some of the paths, one bit each.
using PathSet = unsigned;
GRADALIGN_HD bool holds(PathSet paths, int i) { return paths >> i & 1; }

// Factor the rows and columns of `paths` of a positive definite matrix, of which the lower triangle is read, as L D L^T; L D replaces it.
GRADALIGN_HD void factor(int n, PathSet paths, const Numbers& a) {
  GRADALIGN_LOOP
  for (int column = 0; column < n; ++column) {
    if (!holds(paths, column)) continue;
    GRADALIGN_LOOP
    for (int i = column + 1; i < n; ++i) {
      if (!holds(paths, i)) continue;
      const double ratio = a[i * n + column] / a[column * n + column];
      GRADALIGN_LOOP
      for (int j = column + 1; j <= i; ++j) a[i * n + j] -= ratio * a[j * n + column];
    }
  }
}

// Solve a x = b with the factors of `paths`; x replaces b, where it is one of the paths. A singular matrix gives values that are not finite.
GRADALIGN_HD void substitute(int n, PathSet paths, const Numbers& a, const Numbers& b) {
  GRADALIGN_LOOP
  for (int column = 0; column < n; ++column) {
    if (!holds(paths, column)) continue;
    b[column] /= a[column * n + column];
    GRADALIGN_LOOP
    for (int i = column + 1; i < n; ++i)
      if (holds(paths, i)) b[i] -= a[i * n + column] * b[column];
  }
  GRADALIGN_LOOP
  for (int column = n - 1; column >= 0; --column) {
    if (!holds(paths, column)) continue;
    double sum = 0;
    GRADALIGN_LOOP
    for (int i = column + 1; i < n; ++i)
      if (holds(paths, i)) sum += a[i * n + column] * b[i];
    b[column] -= sum / a[column * n + column];
  }
}

// (G x)_i
GRADALIGN_HD double product_row(int n, const Numbers& gram, const Numbers& x, int i) {
  double sum = 0;
  GRADALIGN_LOOP
  for (int j = 0; j < n; ++j) sum += gram[i * n + j] * x[j];
  return sum;
}

// product = G x; returns x^T G x + eps.
GRADALIGN_HD double quadratic(int n, const Numbers& gram, const Numbers& x, double eps, const Numbers& product) {
  double sum = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    product[i] = product_row(n, gram, x, i);
    sum += x[i] * product[i];
  }
  return larger(sum, 0.0) + eps;
}

GRADALIGN_HD double mean_square(int n, const Numbers& gram) {
  double sum = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) sum += gram[i * n + i];
  return sum / n;
}

// PCGrad and GradVac: each path meets the others in its order; order is nullptr for 0, 1, ...; targets is nullptr for PCGrad.
GRADALIGN_HD void meet(int n, const Numbers& gram, const int64_t* order, double* targets, const WeighOptions& o, const Numbers& row,
                       const Numbers& product, const Numbers& weights) {
  GRADALIGN_LOOP
  for (int k = 0; k < n; ++k) weights[k] = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    GRADALIGN_LOOP
    for (int k = 0; k < n; ++k) row[k] = k == i;
    GRADALIGN_LOOP
    for (int m = 0; m < n; ++m) {
      const int64_t met = order ? order[i * n + m] : m;
      if (met == i || met < 0 || met >= n) continue;
      const int j = int(met);
      if (!targets) {
        const double inner = product_row(n, gram, row, j);
        if (inner < 0) row[j] -= inner / larger(gram[j * n + j], kTiny);
        continue;
      }
      double norm_i = sqrt(quadratic(n, gram, row, 0, product)), sum = 0;
      const double norm_j = sqrt(gram[j * n + j]);
      GRADALIGN_LOOP
      for (int k = 0; k < n; ++k) sum += fabs(row[k]) * sqrt(gram[k * n + k]);
      // Of a path that was pulled to nothing, rounding is all that is left: it has no direction.
      if (!(norm_i > kNothing * sum)) norm_i = 0;
      row[j] += pull_up(norm_i, norm_j, product[j], targets[i * n + j], o);
    }
    GRADALIGN_LOOP
    for (int k = 0; k < n; ++k) weights[k] += row[k] / n;
  }
}

// From a y that is the minimum of a convex function among the `free` paths, y = 0 elsewhere, to its minimum over y >= 0. `minimum(free)` puts
// the minimum with all other paths at 0 in z, and `slope(i)` is the slope along path i there, with its rounding added.
template <typename Minimum, typename Slope>
GRADALIGN_HD void active_set(int n, PathSet free, const Numbers& y, const Numbers& z, Minimum&& minimum, Slope&& slope) {
  GRADALIGN_LOOP
  for (int round = 0; round < kRoundsPerPath * n; ++round) {
    minimum(free);
    bool good = true;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) good = good && finite(z[i]);
    double step = INFINITY;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      // Where the matrix is singular, too: the coordinate freed last is at 0, so that the step has length 0.
      if (!good) z[i] = -1;
      if (holds(free, i) && z[i] < 0) step = smaller(step, y[i] / (y[i] - z[i]));
    }
    // Rounding has made the Gram matrix indefinite: it tells no more.
    if (step == 0) return;
    PathSet kept = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      if (!holds(free, i)) continue;
      const bool falls = z[i] < 0 && y[i] / (y[i] - z[i]) <= step;
      y[i] = falls ? 0.0 : step < 1 ? larger(y[i] + step * (z[i] - y[i]), 0.0) : z[i];
      if (y[i] > 0) kept |= 1u << i;
    }
    free = kept;
    if (step < 1) continue;
    double least = 0;
    int best = n;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      if (holds(free, i)) continue;
      const double found = slope(i);
      if (found < least) {
        least = found;
        best = i;
      }
    }
    if (best == n) return;
    free |= 1u << best;
  }
}

// norms[i] = |g_i|; cosines, 0 where a gradient is zero.
GRADALIGN_HD void normalize(int n, const Numbers& gram, const Numbers& norms, const Numbers& cosines) {
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) norms[i] = root(gram[i * n + i]);
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) cosines[i] = gram[i] / larger(norms[i / n] * norms[i % n], kTiny);
}

// system = cosines, with what rounding asks for on its diagonal, factored.
GRADALIGN_HD void factor_cosines(int n, PathSet free, const Numbers& cosines, const Numbers& system) {
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) system[i] = cosines[i] + (i % (n + 1) == 0 ? 2 * n * kRounding : 0.0);
  factor(n, free, system);
}

// Minimise linear.x + k sqrt(x^T G x + eps) over the simplex; `linear` is in the range of G.
GRADALIGN_HD void minimize_on_simplex(int n, const Numbers& linear, double k, const Numbers& gram, double eps, const Numbers& x,
                                      const Numbers& scratch) {
  const Numbers norms = scratch, z = scratch.from(n), d = scratch.from(2 * n), cosines = scratch.from(3 * n), system = cosines.from(n * n);
  double shortest = INFINITY, least = INFINITY;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) shortest = smaller(shortest, gram[i * n + i]);
  shortest = larger(shortest, kTiny);
  int best = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    const double square = larger(gram[i * n + i], 0.0), value = linear[i] + k * sqrt(square + eps);
    norms[i] = sqrt(square + shortest);
    x[i] = 0;
    if (value < least) {
      least = value;
      best = i;
    }
  }
  x[best] = 1;
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) cosines[i] = (gram[i] + shortest) / (norms[i / n] * norms[i % n]);
  double t = 0, level = 0, size = 0;
  active_set(
      n, 1u << best, x, z,
      [&](PathSet free) {
        factor_cosines(n, free, cosines, system);
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          z[i] = 1 / norms[i];
          d[i] = linear[i] / norms[i];
        }
        substitute(n, free, system, z);
        substitute(n, free, system, d);
        double one = 0, total = 0;
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          z[i] = holds(free, i) ? z[i] / norms[i] : 0.0;
          d[i] = holds(free, i) ? d[i] / norms[i] : 0.0;
          one += z[i];
          total += d[i];
        }
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          z[i] /= one;
          d[i] = total * z[i] - d[i];
        }
        double square = 0, falls = 0;
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          square += z[i] * product_row(n, gram, z, i);
          falls += d[i] * product_row(n, gram, d, i);
        }
        // Where the function falls for ever, far beyond the simplex, but finite.
        t = sqrt((larger(square, 0.0) + eps) / larger(larger(k * k - larger(falls, 0.0), kEndless * eps), kTiny));
        level = (1 + t * total) / one;
        size = 0;
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          z[i] += t * d[i];
          size += z[i] * norms[i];
        }
      },
      [&](int i) {
        double product = 0;
        GRADALIGN_LOOP
        for (int j = 0; j < n; ++j) product += (gram[i * n + j] + shortest) * z[j];
        return (product + t * linear[i] - level) / norms[i] + n * kRounding * (size + (t * fabs(linear[i]) + fabs(level)) / norms[i]);
      });
  double sum = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) sum += x[i];
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) x[i] /= sum;
}

// Minimise v^T G v over v >= start, where `lengths` is the norms times start; v - start is added to the weights.
GRADALIGN_HD void project_to_dual_cone(int n, const Numbers& norms, const Numbers& cosines, const Numbers& lengths, const Numbers& weights,
                                       const Numbers& scratch) {
  const Numbers y = scratch, z = scratch.from(n), system = scratch.from(2 * n);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) y[i] = 0;
  double size = 0;
  active_set(
      n, 0, y, z,
      [&](PathSet free) {
        factor_cosines(n, free, cosines, system);
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) z[i] = holds(free, i) ? -product_row(n, cosines, lengths, i) : 0.0;
        substitute(n, free, system, z);
        size = 0;
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) size += lengths[i] + z[i];
      },
      [&](int i) { return product_row(n, cosines, lengths, i) + product_row(n, cosines, z, i) + n * kRounding * size; });
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i)
    if (norms[i] > 0) weights[i] += y[i] / norms[i];
}

// Eigenvalues on the diagonal of `matrix`, eigenvectors in the columns of `vectors`, by Jacobi's rotations.
GRADALIGN_HD void eigen(int n, const Numbers& matrix, const Numbers& vectors) {
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) vectors[i] = i / n == i % n;
  GRADALIGN_LOOP
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
    GRADALIGN_LOOP
    for (int p = 0; p < n; ++p) {
      GRADALIGN_LOOP
      for (int q = p + 1; q < n; ++q) {
        const double off = matrix[p * n + q];
        if (off == 0) continue;
        const double tau = (matrix[q * n + q] - matrix[p * n + p]) / (2 * off);
        const double tangent = (tau < 0 ? -1 : 1) / (fabs(tau) + sqrt(1 + tau * tau));
        const double c = 1 / sqrt(1 + tangent * tangent), s = tangent * c;
        GRADALIGN_LOOP
        for (int i = 0; i < n; ++i) {
          const double a = vectors[i * n + p], b = vectors[i * n + q];
          vectors[i * n + p] = c * a - s * b;
          vectors[i * n + q] = s * a + c * b;
          if (i == p || i == q) continue;
          const double u = matrix[i * n + p], v = matrix[i * n + q];
          matrix[i * n + p] = matrix[p * n + i] = c * u - s * v;
          matrix[i * n + q] = matrix[q * n + i] = s * u + c * v;
        }
        matrix[p * n + p] -= tangent * off;
        matrix[q * n + q] += tangent * off;
        matrix[p * n + q] = matrix[q * n + p] = 0;
      }
    }
  }
}

// What counts as zero beside the largest eigenvalue on the diagonal.
GRADALIGN_HD double eigenvalue_cut(int n, const Numbers& matrix) {
  double most = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) most = larger(most, matrix[i * n + i]);
  return kVanishing * most;
}

GRADALIGN_HD void scale_to_sum_one(int n, const Numbers& weights) {
  double most = kTiny, sum = 0, size = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) most = larger(most, fabs(weights[i]));
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    weights[i] /= most;
    sum += weights[i];
    size += fabs(weights[i]);
  }
  const bool vanishes = fabs(sum) <= kVanishing * size;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = vanishes ? 1.0 / n : weights[i] / sum;
}

GRADALIGN_HD void weigh_imtlg(int n, const Numbers& gram, const Numbers& weights, const Numbers& scratch) {
  const Numbers norms = scratch, matrix = scratch.from(n), vectors = matrix.from(n * n);
  normalize(n, gram, norms, matrix);
  eigen(n, matrix, vectors);
  const double cut = eigenvalue_cut(n, matrix);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = 0;
  GRADALIGN_LOOP
  for (int e = 0; e < n; ++e) {
    if (!(matrix[e * n + e] > cut)) continue;
    double sum = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) sum += vectors[i * n + e];
    // Where the directions cancel, their sum has none of what is left.
    if (fabs(sum) <= kVanishing) continue;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) weights[i] += vectors[i * n + e] * sum / matrix[e * n + e];
  }
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = norms[i] > 0 ? weights[i] / norms[i] : 0.0;
  scale_to_sum_one(n, weights);
}

GRADALIGN_HD void weigh_alignedmtl(int n, const Numbers& gram, const Numbers& weights, const Numbers& scratch) {
  const Numbers matrix = scratch, vectors = scratch.from(n * n);
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) matrix[i] = gram[i];
  eigen(n, matrix, vectors);
  const double cut = eigenvalue_cut(n, matrix);
  double least = INFINITY;
  GRADALIGN_LOOP
  for (int e = 0; e < n; ++e)
    if (matrix[e * n + e] > cut) least = smaller(least, matrix[e * n + e]);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = finite(least) ? 0.0 : 1.0 / n;
  GRADALIGN_LOOP
  for (int e = 0; e < n; ++e) {
    if (!(matrix[e * n + e] > cut)) continue;
    double sum = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) sum += vectors[i * n + e];
    sum *= sqrt(least / matrix[e * n + e]) / n;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) weights[i] += vectors[i * n + e] * sum;
  }
}

GRADALIGN_HD void weigh_nashmtl(int n, const Numbers& gram, const Numbers& weights, const Numbers& scratch) {
  const Numbers norms = scratch, product = scratch.from(n), z = scratch.from(2 * n), matrix = scratch.from(3 * n), system = matrix.from(n * n),
                y = weights;
  normalize(n, gram, norms, matrix);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    matrix[i * n + i] += kNashRidge + (norms[i] > 0 ? 0.0 : 1.0);
    y[i] = 1;
  }
  GRADALIGN_LOOP
  for (int round = 0; round < kNashRounds; ++round) {
    double size_of_y = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) size_of_y += y[i] * y[i];
    const double length = sqrt(n / larger(quadratic(n, matrix, y, 0, product), kNashRidge * size_of_y));
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) y[i] *= length;
    double square = 0, size = 0, room = INFINITY;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      z[i] = 1 - y[i] * product[i] * length;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) system[i * n + j] = matrix[i * n + j] * y[i] * y[j] + double(i == j);
    }
    factor(n, (1u << n) - 1, system);
    substitute(n, (1u << n) - 1, system, z);
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      double inner = 0;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) inner += matrix[i * n + j] * y[i] * y[j] * z[j];
      square += z[i] * inner;
      size += z[i] * z[i];
      if (z[i] < 0) room = smaller(room, -1 / z[i]);
    }
    square = larger(square, 0.0);
    // z . residual, but of terms that do not cancel: at the end z is all rounding.
    const double fall = square + size, decrement = sqrt(fall);
    double t = decrement < 0.25 ? 1.0 : 1 / (1 + decrement);
    GRADALIGN_LOOP
    for (int search = 0; search < kNashSearch; ++search) {
      double slope = square, curvature = square;
      GRADALIGN_LOOP
      for (int i = 0; i < n; ++i) {
        const double quotient = z[i] / (1 + t * z[i]);
        slope += z[i] * quotient;
        curvature += quotient * quotient;
      }
      t = smaller(larger(t - (t * slope - fall) / larger(curvature, kTiny), 0.1 * t), 0.5 * (t + room));
    }
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) y[i] *= 1 + t * z[i];
  }
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = norms[i] > 0 ? y[i] / norms[i] : 0.0;
  scale_to_sum_one(n, weights);
}

// Weights of 3 to kMaxPaths paths; targets [n, n] are GradVac's, which it moves. `scratch` holds weigh_scratch(n) numbers.
GRADALIGN_HD void weigh_many(int n, const Numbers& gram, const int64_t* order, double* targets, const WeighOptions& o, const Numbers& weights,
                             const Numbers& scratch) {
  switch (o.method) {
    case Weighing::kPcgrad: return meet(n, gram, order, nullptr, o, scratch, scratch.from(n), weights);
    case Weighing::kGradvac: return meet(n, gram, order, targets, o, scratch, scratch.from(n), weights);
    case Weighing::kCagrad:
    case Weighing::kMgda: {
      const bool cagrad = o.method == Weighing::kCagrad;
      const Numbers linear = scratch, rest = scratch.from(n);
      double total = 0;
      GRADALIGN_LOOP
      for (int i = 0; i < n; ++i) {
        double sum = 0;
        GRADALIGN_LOOP
        for (int j = 0; j < n; ++j) sum += gram[i * n + j];
        linear[i] = cagrad ? sum / n : 0.0;
        total += sum;
      }
      const double k = cagrad ? o.c * root(total / (n * n)) : 1.0;
      const double eps = larger((cagrad ? kCancelled * kCancelled : 1.0) * mean_square(n, gram), kTiny);
      minimize_on_simplex(n, linear, k, gram, eps, weights, rest);
      if (!cagrad) return;
      const double ratio = k / sqrt(quadratic(n, gram, weights, eps, rest));
      GRADALIGN_LOOP
      for (int i = 0; i < n; ++i) weights[i] = (1.0 / n + ratio * weights[i]) / (1 + o.c * o.c);
      return;
    }
    case Weighing::kDualproj:
    case Weighing::kUpgrad: {
      // UPGrad: each path's own gradient is projected, and the results are added.
      const bool upgrad = o.method == Weighing::kUpgrad;
      const Numbers norms = scratch, lengths = scratch.from(n), cosines = scratch.from(2 * n), rest = cosines.from(n * n);
      normalize(n, gram, norms, cosines);
      GRADALIGN_LOOP
      for (int k = 0; k < n; ++k) weights[k] = 1.0 / n;
      GRADALIGN_LOOP
      for (int i = 0; i < (upgrad ? n : 1); ++i) {
        GRADALIGN_LOOP
        for (int k = 0; k < n; ++k) lengths[k] = !upgrad || k == i ? norms[k] / n : 0.0;
        project_to_dual_cone(n, norms, cosines, lengths, weights, rest);
      }
      return;
    }
    case Weighing::kImtlg: return weigh_imtlg(n, gram, weights, scratch);
    case Weighing::kAlignedmtl: return weigh_alignedmtl(n, gram, weights, scratch);
    case Weighing::kNashmtl: return weigh_nashmtl(n, gram, weights, scratch);
    default:
      GRADALIGN_LOOP
      for (int k = 0; k < n; ++k) weights[k] = 1.0 / n;
  }
}

// Weights of one problem, of at most two paths where kMany is false: one path has exactly 1; a Gram matrix with an entry that is not finite
// gives NaN, and leaves the targets as they are.
template <bool kMany = true>
GRADALIGN_HD void weigh_paths(int n, const Numbers& gram, const int64_t* order, double* targets, const WeighOptions& o, const Numbers& weights,
                              const Numbers& scratch) {
  bool good = true;
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) good = good && finite(gram[i]);
  if (!good) {
    GRADALIGN_LOOP
    for (int k = 0; k < n; ++k) weights[k] = NAN;
  } else if (n == 1) {
    weights[0] = 1;
  } else if (n == 2 || !kMany) {
    double rho_ab = targets ? targets[1] : 0, rho_ba = targets ? targets[2] : 0;
    const Two found = weigh_two(gram[0], gram[1], gram[3], rho_ab, rho_ba, o);
    if (targets) {
      targets[1] = rho_ab;
      targets[2] = rho_ba;
    }
    weights[0] = found.a;
    weights[1] = found.b;
  } else if constexpr (kMany) {
    weigh_many(n, gram, order, targets, o, weights, scratch);
  }
}

}  // namespace gradalign

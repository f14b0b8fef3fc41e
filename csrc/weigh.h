// From a Gram matrix to the weights of its paths: one source for host and device, float64 throughout. Equivalent to `weigh` in
// gradalign/reference.py; gradalign/alignment.py says what each method is and where it comes from.
//
// Two paths have closed forms, in registers. More paths are solved by the same iterations as in alignment.py, on arrays that the caller gives:
// on the device in shared memory, since a local array indexed in a loop would lie in the stack.
#pragma once

#include <cmath>

#include "philox.h"

#if defined(__CUDACC__)
#define GRADALIGN_LOOP _Pragma("unroll 1")
#else
#define GRADALIGN_LOOP
#endif

namespace gradalign {

// In the order of names in csrc/weigh_options.h.
enum class Weighing : int { kMean, kPcgrad, kGradvac, kCagrad, kMgda, kDualproj, kUpgrad, kImtlg, kAlignedmtl, kNashmtl, kCount };

constexpr int kWeighPaths = 8;

struct WeighOptions {
  Weighing method;
  bool always;
  double beta, c;
};

// The same numbers as in alignment.py.
constexpr double kTiny = 1e-300, kCancelled = 1e-6, kMaxTarget = 1.0 - 1e-6, kNothing = 1e-7, kVanishing = 1e-12, kNashRidge = 1e-10;
constexpr int kNashRounds = 16, kNashSearch = 4, kJacobiSweeps = 12;

GRADALIGN_HD double larger(double a, double b) { return a > b ? a : b; }
GRADALIGN_HD double smaller(double a, double b) { return a < b ? a : b; }
GRADALIGN_HD double root(double a) { return sqrt(larger(a, 0.0)); }
GRADALIGN_HD bool finite(double a) { return fabs(a) <= 1.7976931348623157e308; }

// The t in [low, high] that minimises slope t + k sqrt(alpha t^2 + 2 beta t + gamma).
GRADALIGN_HD double exact_step(double slope, double k, double alpha, double beta, double gamma, double low, double high) {
  alpha = larger(alpha, kTiny);
  const double curvature = k * k * alpha - slope * slope;
  const double delta = larger(gamma - beta * beta / alpha, 0.0);
  double u = 0;
  if (slope != 0) u = curvature > 0 ? smaller(sqrt(slope * slope * delta / larger(alpha * curvature, kTiny)), 1 / kTiny) : 1 / kTiny;
  return smaller(larger((slope > 0 ? -u : u) - beta / alpha, low), high);
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
      const double t = exact_step(slope_a - slope_b, k, aa + bb - 2 * ab, product_a - product_b, gamma, -0.5, 0.5);
      const double a = larger(0.5 + t, 0.0), b = larger(0.5 - t, 0.0);
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
      if (!(a > 0 && b > 0)) return two_of_sum_one(a > 0, b > 0);
      // Lengths first, so that nothing overflows.
      const double longer = larger(a, b);
      return two_of_sum_one(b / longer, a / longer);
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
    default:
      return {0.5, 0.5};
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
constexpr int weigh_scratch(int num_paths) { return 2 * num_paths * num_paths + 6 * num_paths + 2; }

// Solve a x = b by elimination with the largest pivots; x replaces b. A singular matrix gives values that are not finite.
GRADALIGN_HD void solve_in_place(int n, const Numbers& a, const Numbers& b) {
  GRADALIGN_LOOP
  for (int column = 0; column < n; ++column) {
    int pivot = column;
    GRADALIGN_LOOP
    for (int i = column + 1; i < n; ++i)
      if (fabs(a[i * n + column]) > fabs(a[pivot * n + column])) pivot = i;
    if (pivot != column) {
      GRADALIGN_LOOP
      for (int j = column; j <= n; ++j) {
        double& upper = j < n ? a[column * n + j] : b[column];
        double& lower = j < n ? a[pivot * n + j] : b[pivot];
        const double swapped = upper;
        upper = lower;
        lower = swapped;
      }
    }
    GRADALIGN_LOOP
    for (int i = column + 1; i < n; ++i) {
      const double factor = a[i * n + column] / a[column * n + column];
      GRADALIGN_LOOP
      for (int j = column + 1; j < n; ++j) a[i * n + j] -= factor * a[column * n + j];
      b[i] -= factor * b[column];
    }
  }
  GRADALIGN_LOOP
  for (int i = n - 1; i >= 0; --i) {
    double sum = b[i];
    GRADALIGN_LOOP
    for (int j = i + 1; j < n; ++j) sum -= a[i * n + j] * b[j];
    b[i] = sum / a[i * n + i];
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
GRADALIGN_HD void meet(int n, const Numbers& gram, const int64_t* order, double* targets, const WeighOptions& o, const Numbers& row, const Numbers& product,
                       const Numbers& weights) {
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

// Newton's direction d among the coordinates with x > 0, which sums to 0; zero where it would not descend. `system` holds (n + 1) (n + 2)
// numbers, of which the last n + 1 become the direction.
GRADALIGN_HD void newton_direction(int n, const Numbers& x, const Numbers& linear, double scale, const Numbers& product, double gamma, const Numbers& gram,
                                   const Numbers& system, const Numbers& d) {
  const int m = n + 1;
  const Numbers right = system.from(m * m);
  const double ridge = 1e-14 * mean_square(n, gram);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    const bool free_i = x[i] > 0;
    GRADALIGN_LOOP
    for (int j = 0; j < n; ++j) {
      const double hessian = scale * (gram[i * n + j] - product[i] * product[j] / gamma + (i == j ? ridge : 0.0));
      system[i * m + j] = free_i && x[j] > 0 ? hessian : double(i == j);
    }
    system[i * m + n] = system[n * m + i] = free_i;
    right[i] = free_i ? -(linear[i] + scale * product[i]) : 0.0;
  }
  system[n * m + n] = right[n] = 0;
  solve_in_place(m, system, right);
  bool good = true;
  int count = 0;
  double sum = 0, most = 0, slope = 0;
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    d[i] = x[i] > 0 ? right[i] : 0.0;
    good = good && finite(right[i]);
    sum += d[i];
    count += x[i] > 0;
  }
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    d[i] = good && x[i] > 0 ? d[i] - sum / count : 0.0;
    most = larger(most, fabs(d[i]));
  }
  most = larger(most, kTiny);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    d[i] /= most;
    slope += d[i] * (linear[i] + scale * product[i]);
  }
  if (!(slope < 0)) {
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) d[i] = 0;
  }
}

// Minimise linear.x + k sqrt(x^T G x + eps) over the simplex, from its centre.
GRADALIGN_HD void minimize_on_simplex(int n, const Numbers& linear, double k, const Numbers& gram, double eps, const Numbers& x, const Numbers& scratch) {
  const Numbers product = scratch, d = scratch.from(n), system = scratch.from(2 * n);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) x[i] = 1.0 / n;
  GRADALIGN_LOOP
  for (int round = 0; round < (2 * n > 16 ? 2 * n : 16); ++round) {
    double gamma = quadratic(n, gram, x, eps, product);
    double best = k * sqrt(gamma), step = 0;
    int up = 0, down = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i)
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) {
        if (i == j) continue;
        const double alpha = gram[i * n + i] + gram[j * n + j] - 2 * gram[i * n + j], beta = product[i] - product[j], slope = linear[i] - linear[j];
        const double t = exact_step(slope, k, alpha, beta, gamma, -x[i], x[j]);
        const double value = slope * t + k * root((alpha * t + 2 * beta) * t + gamma);
        if (value < best) {
          best = value;
          step = t;
          up = i;
          down = j;
        }
      }
    if (up != down) {
      x[up] = larger(x[up] + step, 0.0);
      x[down] = larger(x[down] - step, 0.0);
    }
    gamma = quadratic(n, gram, x, eps, product);
    newton_direction(n, x, linear, k / sqrt(gamma), product, gamma, gram, system, d);
    double room = INFINITY, slope = 0, alpha = 0, beta = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      if (d[i] < 0) room = smaller(room, -x[i] / d[i]);
      slope += linear[i] * d[i];
      alpha += d[i] * product_row(n, gram, d, i);
      beta += d[i] * product[i];
    }
    const double t = exact_step(slope, k, alpha, beta, gamma, 0.0, finite(room) ? room : 0.0);
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) x[i] = larger(x[i] + t * d[i], 0.0);
  }
}

// Minimise v^T G v over v >= start; v replaces start.
GRADALIGN_HD void project_to_dual_cone(int n, const Numbers& gram, const Numbers& start, const Numbers& scratch) {
  const Numbers added = scratch, system = scratch.from(n), right = system.from(n * n);
  const double ridge = 1e-14 * larger(mean_square(n, gram), kTiny);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) added[i] = 0;
  GRADALIGN_LOOP
  for (int round = 0; round < (2 * n > 16 ? 2 * n : 16); ++round) {
    double least = 0, step = 0;
    int best = 0;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      const double square = larger(gram[i * n + i], kTiny);
      double s = 0;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) s += gram[i * n + j] * (start[j] + added[j]);
      const double t = larger(-s / square, -added[i]), value = t * (2 * s + t * square);
      if (value < least) {
        least = value;
        step = t;
        best = i;
      }
    }
    added[best] = larger(added[best] + step, 0.0);
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      double s = 0;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) {
        s += gram[i * n + j] * (start[j] + added[j]);
        system[i * n + j] = added[i] > 0 && added[j] > 0 ? gram[i * n + j] + (i == j ? ridge : 0.0) : double(i == j);
      }
      right[i] = added[i] > 0 ? -s : 0.0;
    }
    solve_in_place(n, system, right);
    bool good = true;
    double room = 1;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      good = good && finite(right[i]);
      if (!(added[i] > 0)) right[i] = 0;
      if (right[i] < 0) room = smaller(room, -added[i] / right[i]);
    }
    if (!good) continue;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) added[i] = larger(added[i] + room * right[i], 0.0);
  }
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) start[i] += added[i];
}

// Eigenvalues on the diagonal of `matrix`, eigenvectors in the columns of `vectors`, by Jacobi's rotations.
GRADALIGN_HD void eigen(int n, const Numbers& matrix, const Numbers& vectors) {
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) vectors[i] = i / n == i % n;
  GRADALIGN_LOOP
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep)
    GRADALIGN_LOOP
    for (int p = 0; p < n; ++p)
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

// norms[i] = |g_i|; cosines, 0 where a gradient is zero.
GRADALIGN_HD void normalize(int n, const Numbers& gram, const Numbers& norms, const Numbers& cosines) {
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) norms[i] = root(gram[i * n + i]);
  GRADALIGN_LOOP
  for (int i = 0; i < n * n; ++i) cosines[i] = gram[i] / larger(norms[i / n] * norms[i % n], kTiny);
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
  const Numbers norms = scratch, product = scratch.from(n), z = scratch.from(2 * n), matrix = scratch.from(3 * n), system = matrix.from(n * n), y = weights;
  normalize(n, gram, norms, matrix);
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) {
    matrix[i * n + i] += kNashRidge + (norms[i] > 0 ? 0.0 : 1.0);
    y[i] = 1;
  }
  GRADALIGN_LOOP
  for (int round = 0; round < kNashRounds; ++round) {
    const double length = sqrt(n / quadratic(n, matrix, y, 0, product));
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) y[i] *= length;
    double square = 0, slope = 0, decrement = 0, room = INFINITY;
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      z[i] = 1 - y[i] * product[i] * length;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) system[i * n + j] = matrix[i * n + j] * y[i] * y[j] + double(i == j);
    }
    solve_in_place(n, system, z);
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) {
      double inner = 0;
      GRADALIGN_LOOP
      for (int j = 0; j < n; ++j) inner += matrix[i * n + j] * y[i] * y[j] * z[j];
      const double residual = 1 - y[i] * product[i] * length;
      square += z[i] * inner;
      slope += z[i] * (1 - residual);
      decrement += z[i] * residual;
      if (z[i] < 0) room = smaller(room, -1 / z[i]);
    }
    decrement = root(decrement);
    double t = decrement < 0.25 ? 1.0 : 1 / (1 + decrement);
    GRADALIGN_LOOP
    for (int search = 0; search < kNashSearch; ++search) {
      double first = square * t + slope, second = square;
      GRADALIGN_LOOP
      for (int i = 0; i < n; ++i) {
        const double quotient = z[i] / (1 + t * z[i]);
        first -= quotient;
        second += quotient * quotient;
      }
      t = smaller(larger(t - first / larger(second, kTiny), 0.1 * t), 0.5 * (t + room));
    }
    GRADALIGN_LOOP
    for (int i = 0; i < n; ++i) y[i] *= 1 + t * z[i];
  }
  GRADALIGN_LOOP
  for (int i = 0; i < n; ++i) weights[i] = norms[i] > 0 ? y[i] / norms[i] : 0.0;
  scale_to_sum_one(n, weights);
}

// Weights of 3 to kWeighPaths paths; targets [n, n] are GradVac's, which it moves. `scratch` holds weigh_scratch(n) numbers.
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
      const Numbers start = scratch, rest = scratch.from(n);
      GRADALIGN_LOOP
      for (int k = 0; k < n; ++k) weights[k] = 0;
      GRADALIGN_LOOP
      for (int i = 0; i < (upgrad ? n : 1); ++i) {
        GRADALIGN_LOOP
        for (int k = 0; k < n; ++k) start[k] = !upgrad || k == i ? 1.0 / n : 0.0;
        project_to_dual_cone(n, gram, start, rest);
        GRADALIGN_LOOP
        for (int k = 0; k < n; ++k) weights[k] += start[k];
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

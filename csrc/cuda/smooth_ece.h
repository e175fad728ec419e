// The smooth ECE on a GPU: a fixed sequence of launches, none of which the host waits for.
#pragma once

#include "arguments.h"
#include "smooth_ece_math.h"

namespace calguide {

class Place;

// Residuals are deposited in so many bins whatever the bandwidth: 16 per sigma at the least one.
constexpr int deposit_bins = 1 << 14;
// Moments are sums over the nodes in two stages, first down the columns of a table of so many columns and rows.
constexpr int moment_columns = 256, moment_rows = deposit_bins / moment_columns;
// The sum of all shares' sizes is at most 1.25 of the total weight; in these units it stays below 2^62.
constexpr double deposit_unit = 0x1p-61;
constexpr int weight_parts = 256;
constexpr int most_intervals = static_cast<int>(points_per_sigma / least_bandwidth + 0.5);
constexpr int most_cells = 1 << 15;
static_assert(most_cells * least_bandwidth >= cells_per_sigma, "the curve of the least bandwidth must have room");

// What the launches leave each other. The caller sees to the memory, which need not be cleared.
struct SmoothEceScratch {
  unsigned long long nodes[deposit_bins + 1];  // residuals by share of the total weight, in units of deposit_unit
  unsigned spoilt;                             // not 0: a confidence or a weight is not allowed
  double weights[weight_parts], total;
  double waves[moment_rows + 1][moment_columns][2];  // sums down the columns times e^(i pi q row / rows), by q
  double moments[most_terms], sine[most_terms];
  double on_grid[most_intervals + 1];
  // grid points and, before or after each, a place for a vertex; a value of 0 is to be passed over
  double place[2 * (most_intervals + 1)], value[2 * (most_intervals + 1)];
  int bracket[2 * (most_intervals + 1)][2];
  double root[2 * (most_intervals + 1)], rise[2 * (most_intervals + 1)];
};

struct CurveNode {
  double value, slope;  // of S, the slope by the number of cells
};

struct SmoothEceGradientScratch {
  CurveNode nodes[most_cells + 1];
};

// Four launches on the place's stream. The scratch memory begins on a boundary of sixteen bytes. What is not allowed
// makes the results NaN. Throws what CUDA says.
void launch_smooth_ece(const SmoothEceArguments& arguments, SmoothEceScratch* scratch, const Place& place);

// Two more; the same of them.
void launch_smooth_ece_gradient(const SmoothEceGradientArguments& arguments, SmoothEceGradientScratch* scratch,
                                const Place& place);

}  // namespace calguide

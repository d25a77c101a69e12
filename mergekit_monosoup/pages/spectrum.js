// What another R would make of a matrix, from the singular values that its record holds.
//
// Stored are σ/σ₁ of the first singular values one by one (`leading`), and at equally spaced places
// from the first to the last one (`spectrum`). What lies between is interpolated: the logarithm of
// σ along that of its place, which is exact for a power law.

const SLACK = 1e-9; // as in kernel/monosoup.py: R is met to the last digit by equal values

// Return σ/σ₁ of every direction, and tails[i] = Σ_{j>=i} σ_j², counted from zero.
function singularValues({ rank, spectrum, leading }) {
  const known = new Map(
    spectrum.map((value, i) => [(i * (rank - 1)) / Math.max(spectrum.length - 1, 1), value]),
  );
  leading.forEach((value, i) => known.set(i, value));
  const places = [...known.keys()].sort((a, b) => a - b);
  const x = places.map((place) => Math.log1p(place));
  const y = places.map((place) => Math.log(Math.max(known.get(place), Number.MIN_VALUE)));
  const sigma = new Float64Array(rank);
  for (let i = 0, above = 0; i < rank; i++) {
    while (above < places.length - 1 && places[above] < i) above++;
    const below = Math.max(above - 1, 0);
    const share =
      places[above] > places[below] ? (Math.log1p(i) - x[below]) / (x[above] - x[below]) : 0;
    sigma[i] =
      places[above] === i ? known.get(i) : Math.exp(y[below] + share * (y[above] - y[below]));
  }
  const tails = new Float64Array(rank + 1);
  for (let i = rank - 1; i >= 0; i--) tails[i] = tails[i + 1] + sigma[i] ** 2;
  return { sigma, tails };
}

// Return the smallest k whose directions hold the share R of the energy, and the paper's numbers
// at it (Eqs. 2 and 5 to 8).
function cutAt({ sigma, tails }, R) {
  const rank = sigma.length;
  const allowed = (1 - R) * (1 + SLACK) * tails[0];
  let low = 1,
    high = rank;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tails[middle] > allowed) low = middle + 1;
    else high = middle;
  }
  const k = low;
  const tail = tails[k] / tails[0];
  const rho = k < rank ? (sigma[k] / sigma[0]) ** 2 : 0;
  const cos_alpha = Math.sqrt(tail);
  const lambda_low = rho + (1 - rho) * cos_alpha;
  return { k, P_k: 1 - tail, rho, cos_alpha, lambda_low, lambda_high: 1 - lambda_low };
}

//! Powers in measurements: which exponents make y = factor · xᵖ · zᑫ fit best, by least squares of the logarithms.

/// p for y = factor · xᵖ; NaN without two different x.
pub(super) fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<[f64; 2]> = points.iter().map(|(x, y)| [x.ln(), y.ln()]).collect();
    let [x, y] = centered(&logs);
    dot(&x, &y) / dot(&x, &x)
}

/// p and q for y = factor · xᵖ · zᑫ; NaN if x and z do not vary on their own.
pub(super) fn exponents(points: &[(f64, f64, f64)]) -> (f64, f64) {
    let logs: Vec<[f64; 3]> = points.iter().map(|(x, z, y)| [x.ln(), z.ln(), y.ln()]).collect();
    let [x, z, y] = centered(&logs);
    // The normal equations of two unknowns.
    let (xx, zz, xz, xy, zy) = (dot(&x, &x), dot(&z, &z), dot(&x, &z), dot(&x, &y), dot(&z, &y));
    let determinant = xx * zz - xz * xz;
    ((xy * zz - zy * xz) / determinant, (zy * xx - xy * xz) / determinant)
}

/// Columns less their means.
fn centered<const N: usize>(rows: &[[f64; N]]) -> [Vec<f64>; N] {
    std::array::from_fn(|column| {
        let mean = rows.iter().map(|row| row[column]).sum::<f64>() / rows.len() as f64;
        rows.iter().map(|row| row[column] - mean).collect()
    })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_found() {
        let points: Vec<(f64, f64)> = [1.0, 10.0, 1000.0].map(|x: f64| (x, 3.0 * x.powf(1.5))).into();
        assert!((exponent(&points) - 1.5).abs() < 1e-9);
        let grid = [(1.0, 2.0), (1.0, 8.0), (10.0, 2.0), (100.0, 64.0)];
        let points: Vec<_> = grid.iter().map(|&(x, z): &(f64, f64)| (x, z, 0.2 * x * z.powf(0.5))).collect();
        let (p, q) = exponents(&points);
        assert!((p - 1.0).abs() < 1e-9 && (q - 0.5).abs() < 1e-9, "{p} {q}");
    }

    #[test]
    fn what_does_not_vary_has_no_exponent() {
        assert!(exponent(&[(2.0, 1.0), (2.0, 3.0)]).is_nan() || exponent(&[(2.0, 1.0), (2.0, 3.0)]).is_infinite());
    }
}

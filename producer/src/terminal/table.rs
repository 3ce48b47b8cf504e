//! A table whose last column takes the rest of the line.

use super::page::cut;

/// Prints rows below their heads, in lines of at most `width` characters; nothing if there are no
/// rows.
pub fn table<const N: usize>(heads: [&str; N], mut rows: Vec<[String; N]>, width: usize) -> String {
    if rows.is_empty() {
        return String::new();
    }
    rows.insert(0, heads.map(str::to_owned));
    let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| widest(column).unwrap_or(0));
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        cut(cells.join("  ").trim_end(), width) + "\n"
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_cut() {
        let rows = [["1d", "a/b", "why"], ["12m", "a/long", "because"]];
        let rows = rows.map(|row| row.map(str::to_owned)).to_vec();
        assert_eq!(
            table(["AGE", "ID", "MESSAGE"], rows, 16),
            "AGE  ID      ME…\n1d   a/b     why\n12m  a/long  be…\n"
        );
        assert_eq!(table(["AGE"], Vec::new(), 80), "");
    }
}

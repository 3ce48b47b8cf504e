//! What must hold for anything that a repository contains. `common/testing/fuzz` looks for inputs for which
//! it does not; its seeds are replayed here.

/// Matches a path with ignore files: `PATH`, then `DIRECTORY` and `LINES` of each file, separated by NUL.
pub fn ignore(input: &[u8]) {
    super::ignore::fuzz::ignore(input);
}

/// Makes a script of a notebook.
pub fn notebook(input: &[u8]) {
    super::notebook::fuzz::notebook(input);
}

#[cfg(test)]
mod tests {
    use testing::seeds::replay;

    #[test]
    fn ignore_files_hold() {
        replay("ignore", super::ignore);
    }

    #[test]
    fn notebooks_hold() {
        replay("notebook", super::notebook);
    }
}

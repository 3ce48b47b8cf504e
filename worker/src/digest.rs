//! The digest: a repository as one text, in gitingest's format.
//!
//! The text is `summary + "\n\n" + tree + "\n" + content`; the crate's page lists where it differs from gitingest 0.3.1.
//! [`write`](write::write) runs in a slot, next to the source, and makes tree and content. [`assemble`](assemble::assemble)
//! runs in the worker; it counts tokens and joins the parts.

pub mod write;

mod walk;

mod directory;

mod ignore;

mod tree;

mod body;

mod notebook;

pub mod assemble;

mod tokens;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use serde::{Deserialize, Serialize};

/// The end of a text that was cut.
pub const CUT_NOTICE: &str = "\n\n[... Summary truncated at 512KB limit ...]";

/// How much of a repository goes into its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestLimits {
    /// Largest file that is shown, in bytes. Larger ones are left out silently.
    pub max_file_bytes: u64,
    /// Most files and symbolic links.
    pub max_files: u64,
    /// Most bytes of all files together, before the text is cut.
    pub max_total_bytes: u64,
    /// Most directories between the root and a file.
    pub max_depth: usize,
    /// Longest text in bytes, without [`CUT_NOTICE`].
    pub max_text_bytes: Option<u64>,
}

impl Default for DigestLimits {
    /// Files of up to 512 KiB, like the reference system, and 512 KiB of text.
    fn default() -> Self {
        Self {
            max_file_bytes: 512 << 10,
            max_files: 10_000,
            max_total_bytes: 500 << 20,
            max_depth: 20,
            max_text_bytes: Some(512 << 10),
        }
    }
}

impl DigestLimits {
    /// Returns gitingest's own: files of up to 10 MiB, and a text of any length.
    pub fn gitingest() -> Self {
        Self {
            max_file_bytes: 10 << 20,
            max_text_bytes: None,
            ..Self::default()
        }
    }
}

/// What a digest is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// gitingest's remote form: `Repository: owner/name` in lower case, and a `Commit` line.
    Repository {
        /// The account.
        owner: String,
        /// The repository's name below it.
        name: String,
    },
    /// gitingest's local form: `Directory: slug`, without a commit.
    Directory {
        /// The path without slashes at its ends.
        slug: String,
    },
}

impl Subject {
    /// Returns the name of the tree's root.
    fn root_name(&self) -> String {
        match self {
            Self::Repository { owner, name } => format!("{owner}-{name}").to_lowercase(),
            Self::Directory { slug } => slug.rsplit('/').next().unwrap_or_default().to_owned(),
        }
    }
}

/// A part of the text that [`write`](write::write) emits. The whole tree comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The directory structure.
    Tree,
    /// The files.
    Content,
}

/// What the summary says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The digest's subject.
    pub subject: Subject,
    /// The commit's hash in hexadecimal; `None` for a repository without commits.
    pub commit: Option<String>,
    /// Files and symbolic links in the tree.
    pub files: u64,
    /// A sentence for each limit that was reached.
    pub notices: Vec<String>,
}

impl Facts {
    /// Returns gitingest's summary.
    fn summary(&self, token_label: &str) -> String {
        let mut summary = match &self.subject {
            Subject::Repository { owner, name } => {
                let mut line = format!("Repository: {owner}/{name}\n").to_lowercase();
                line.replace_range(..1, "R");
                if let Some(commit) = &self.commit {
                    line.push_str(&format!("Commit: {commit}\n"));
                }
                line
            }
            Subject::Directory { slug } => format!("Directory: {slug}\n"),
        };
        summary.push_str(&format!("Files analyzed: {}\n", self.files));
        for notice in &self.notices {
            summary.push_str(notice);
            summary.push('\n');
        }
        summary.push_str(&format!("\nEstimated tokens: {token_label}"));
        summary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn facts() -> Facts {
        Facts {
            subject: Subject::Repository {
                owner: "Owner".to_owned(),
                name: "Name".to_owned(),
            },
            commit: Some("c".repeat(40)),
            files: 12_345,
            notices: Vec::new(),
        }
    }

    #[test]
    fn the_summary_is_gitingests() {
        let commit = "c".repeat(40);
        let mut facts = facts();
        assert_eq!(
            facts.summary("1.2k"),
            format!(
                "Repository: owner/name\nCommit: {commit}\nFiles analyzed: 12345\n\n\
                 Estimated tokens: 1.2k"
            )
        );
        facts.notices = vec![
            "Limit reached: one".to_owned(),
            "Limit reached: two".to_owned(),
        ];
        facts.subject = Subject::Directory {
            slug: "a/b".to_owned(),
        };
        assert_eq!(
            facts.summary("7"),
            "Directory: a/b\nFiles analyzed: 12345\nLimit reached: one\nLimit reached: two\n\n\
             Estimated tokens: 7"
        );
        assert_eq!(facts.subject.root_name(), "b");
    }

    #[test]
    fn facts_and_limits_travel_as_json() {
        let facts = facts();
        let json = serde_json::to_string(&facts).unwrap();
        assert_eq!(serde_json::from_str::<Facts>(&json).unwrap(), facts);
        for limits in [DigestLimits::default(), DigestLimits::gitingest()] {
            let json = serde_json::to_string(&limits).unwrap();
            assert_eq!(serde_json::from_str::<DigestLimits>(&json).unwrap(), limits);
        }
    }
}

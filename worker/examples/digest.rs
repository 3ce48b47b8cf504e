//! Digests a repository on disk: `digest [--name OWNER/NAME] [--no-limit] [--gitingest-limits] PATH
//! [-o FILE]`. Stands in for `worker digest`.

use std::path::Path;

use anyhow::{Context, bail};
use common::repo::RepoRef;
use worker::digest::{self, Limits, Part, Subject};
use worker::fetch::objects::Objects;

fn main() -> anyhow::Result<()> {
    let mut limits = Limits::default();
    let (mut path, mut output, mut name) = (None, None, None);
    let mut no_limit = false;
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "digest");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--no-limit" => no_limit = true,
            "--gitingest-limits" => limits = Limits::gitingest(),
            "--name" => name = arguments.next(),
            "-o" => output = arguments.next(),
            _ if path.is_none() => path = Some(argument),
            _ => bail!("unexpected {argument}"),
        }
    }
    if no_limit {
        limits.max_text_bytes = None;
    }
    let path = path.context("no path given")?;
    let subject = match name {
        Some(name) => {
            let repo: RepoRef = name.parse()?;
            Subject::Repository {
                owner: repo.owner().to_owned(),
                name: repo.name().to_owned(),
            }
        }
        None => Subject::Directory {
            slug: path.trim_matches('/').to_owned(),
        },
    };

    let source = Objects::open(Path::new(&path))?;
    let (mut tree, mut content) = (String::new(), String::new());
    let facts = digest::write(&source, &subject, &limits, &mut |part, text| {
        match part {
            Part::Tree => tree.push_str(text),
            Part::Content => content.push_str(text),
        }
        Ok(())
    })?;
    let digest = digest::assemble(&facts, &tree, &content, limits.max_text_bytes);
    let output = output.context("no -o FILE given")?;
    std::fs::write(output, digest.text)?;
    Ok(())
}

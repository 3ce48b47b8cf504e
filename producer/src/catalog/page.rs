//! Pages for a browser: `index.html`, the catalogue as a table, and `runs/index.html`, the last runs.
//! Static, and whole without scripts; where scripts run, a box filters the table.

use std::fmt::{self, Write};

use common::run::documents::RunHistory;
use common::text::thousands;
use time::OffsetDateTime;
use time::macros::format_description;

use super::{Catalog, Line, State};

/// Longest description that is shown, in characters.
const MAX_DESCRIPTION: usize = 160;

const HEAD: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\">
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<meta name=\"referrer\" content=\"no-referrer\">
<style>
:root{color-scheme:light dark}
body{font:16px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .25rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8884}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.t{white-space:nowrap}
small{display:block;opacity:.75;overflow-wrap:anywhere}
td:first-child{overflow-wrap:anywhere}
tbody{content-visibility:auto;contain-intrinsic-size:auto 3rem}
nav a{display:inline-block;padding:.2rem .45rem}
input{font:inherit;padding:.4rem .6rem;width:min(100%,24rem);box-sizing:border-box}
.bad{color:#b3261e}@media(prefers-color-scheme:dark){.bad{color:#ff8a80}}
@media(max-width:40rem){.w{display:none}th,td{padding-right:.5rem;font-size:.9rem}}
</style>
";

const SCRIPT: &str = "<script>
const form=document.querySelector('form'),box=form.q,rows=[...document.querySelectorAll('tbody tr')];
form.hidden=false;
const text=rows.map(row=>row.textContent.toLowerCase());
const filter=()=>{const words=box.value.toLowerCase().split(/\\s+/);
rows.forEach((row,i)=>row.hidden=!words.every(word=>text[i].includes(word)))};
box.addEventListener('input',filter);form.addEventListener('submit',event=>event.preventDefault());filter();
</script>
";

/// Text inside HTML, in an element or a quoted attribute.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Returns `index.html`.
///
/// # Panics
/// Never: it is written to memory.
pub fn of_catalog(catalog: &Catalog, now: OffsetDateTime) -> String {
    let mut page = HEAD.to_owned();
    write_catalog(&mut page, catalog, now).expect("memory");
    page
}

fn write_catalog(page: &mut String, catalog: &Catalog, now: OffsetDateTime) -> fmt::Result {
    let with_digest = catalog.lines.values().filter(|line| line.digest.is_some());
    let count = thousands(with_digest.count() as u64);
    write!(
        page,
        "<title>Digests of {count} repositories</title></head><body>\n\
         <h1>Digests of {count} repositories</h1>\n\
         <p>As of {}. For programs: <a href=\"catalog.jsonl.gz\">catalog.jsonl.gz</a>, \
         <a href=\"changes.csv\">changes.csv</a>. <a href=\"runs/index.html\">Runs</a></p>\n\
         <form hidden><input name=\"q\" type=\"search\" placeholder=\"Filter by words\" \
         aria-label=\"Filter by words\"></form>\n<nav aria-label=\"By first letter\">",
        minute(now)
    )?;
    let letters = by_letter(catalog);
    for (letter, _) in &letters {
        write!(page, "<a href=\"#{letter}\">{letter}</a>")?;
    }
    page.push_str(
        "</nav>\n<table><thead><tr><th>Repository<th>Pushed<th class=\"n\">Tokens\
         <th class=\"n w\">Bytes<th class=\"w\">State</thead>\n",
    );
    for (letter, lines) in letters {
        write!(page, "<tbody id=\"{letter}\">")?;
        for line in lines {
            write_line(page, line)?;
        }
        page.push_str("</tbody>\n");
    }
    page.push_str("</table>\n");
    page.push_str(SCRIPT);
    page.push_str("</body></html>\n");
    Ok(())
}

fn by_letter(catalog: &Catalog) -> Vec<(char, Vec<&Line>)> {
    let mut letters: Vec<(char, Vec<&Line>)> = Vec::new();
    for (repo, line) in &catalog.lines {
        let first = repo.owner().chars().next().unwrap_or('-');
        let letter = first.to_ascii_lowercase();
        match letters.last_mut() {
            Some((last, lines)) if *last == letter => lines.push(line),
            _ => letters.push((letter, vec![line])),
        }
    }
    letters
}

fn write_line(page: &mut String, line: &Line) -> fmt::Result {
    page.push_str("<tr><td>");
    // Names are long and screens are narrow: they break after the slash first.
    let (owner, name) = (Escaped(line.id.owner()), Escaped(line.id.name()));
    match &line.key {
        Some(key) => write!(page, "<a href=\"{}\">{owner}/<wbr>{name}</a>", Escaped(key))?,
        None => write!(page, "{owner}/<wbr>{name}")?,
    }
    // Others could be scripts.
    if line.url.starts_with("https://") || line.url.starts_with("http://") {
        write!(page, " <a href=\"{}\">↗</a>", Escaped(&line.url))?;
    }
    if let Some(description) = &line.details.description {
        let beginning: String = description.chars().take(MAX_DESCRIPTION).collect();
        let dots = if beginning.len() < description.len() {
            "…"
        } else {
            ""
        };
        write!(page, "<small>{}{dots}</small>", Escaped(&beginning))?;
    }
    match &line.digest {
        Some(digest) => write!(
            page,
            "<td class=\"t\">{:.10}<td class=\"n\">{}<td class=\"n w\">{}",
            digest.pushed_at.as_str(),
            digest.tokens.map(thousands).unwrap_or_default(),
            thousands(digest.bytes)
        )?,
        None => page.push_str("<td><td><td class=\"w\">"),
    }
    let bad = matches!(line.state, State::Failed(_))
        .then_some(" bad")
        .unwrap_or_default();
    writeln!(page, "<td class=\"w{bad}\">{}", line.state)
}

/// Returns `runs/index.html`.
///
/// # Panics
/// Never: it is written to memory.
pub fn of_runs(history: &RunHistory) -> String {
    let mut page = HEAD.to_owned();
    write_runs(&mut page, history).expect("memory");
    page
}

fn write_runs(page: &mut String, history: &RunHistory) -> fmt::Result {
    page.push_str(
        "<title>Runs</title></head><body>\n<h1>The last runs that closed</h1>\n\
         <p><a href=\"../index.html\">Digests</a></p>\n<table><thead><tr><th>Closed\
         <th class=\"n\">Total<th class=\"n w\">Cached<th class=\"n\">Processed<th class=\"n\">Failed\
         <th class=\"n w\">Took<th class=\"w\">Documents</thead><tbody>\n",
    );
    for run in &history.runs {
        let id = Escaped(run.run.as_str());
        let bad = if run.failed > 0 { " bad" } else { "" };
        writeln!(
            page,
            "<tr><td class=\"t\">{}<td class=\"n\">{}<td class=\"n w\">{}<td class=\"n\">{}\
             <td class=\"n{bad}\">{}<td class=\"n w\">{}<td class=\"w\"><a href=\"{id}/summary.json\">{id}</a>",
            minute(run.closed_at),
            thousands(run.total),
            thousands(run.cached),
            thousands(run.processed),
            thousands(run.failed),
            Escaped(&run.elapsed)
        )?;
    }
    page.push_str("</tbody></table></body></html>\n");
    Ok(())
}

/// `2026-11-26 03:00 UTC`.
fn minute(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    let time = time.to_offset(time::UtcOffset::UTC).format(&format);
    time.expect("every time has these")
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;
    use common::ids::{PushedAt, RunId};
    use common::run::documents::HistoricRun;
    use common::store::DigestMeta;
    use time::macros::datetime;

    use super::*;
    use crate::feed::details::Details;

    const NOW: OffsetDateTime = datetime!(2026-11-26 3:00 UTC);

    #[test]
    fn what_strangers_wrote_is_text() {
        let hostile = "<script>alert(1)</script>\"'&";
        let meta = DigestMeta {
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            url: String::new(),
            processed_at: String::new(),
            commit: None,
            format: String::new(),
            bytes: 12_345,
            truncated: false,
            run: RunId::new(),
            sha256: None,
            tokens: Some(2345),
            files: None,
        };
        let mut catalog = Catalog::default();
        let line = Line::new(
            "a/b".parse().unwrap(),
            "javascript:alert(1)",
            State::Current,
        );
        catalog.insert(Line {
            details: Details {
                description: Some(hostile.to_owned()),
                ..Details::default()
            },
            ..line.with_digest(Some(&meta))
        });
        let failed = State::Failed(FaultKind::Gone);
        catalog.insert(Line::new(
            "B/b".parse().unwrap(),
            "https://h/\"><b>",
            failed,
        ));
        let page = of_catalog(&catalog, NOW);
        for part in [
            "<h1>Digests of 1 repositories</h1>",
            "As of 2026-11-26 03:00 UTC.",
            "<a href=\"#a\">a</a><a href=\"#b\">b</a>",
            "<a href=\"gitingest/a/b/summary.txt\">a/<wbr>b</a><small>&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;</small>",
            "<td class=\"t\">2026-01-01<td class=\"n\">2,345<td class=\"n w\">12,345<td class=\"w\">current",
            "<tr><td>B/<wbr>b <a href=\"https://h/&quot;&gt;&lt;b&gt;\">↗</a><td><td><td class=\"w\"><td class=\"w bad\">failed: gone",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!page.contains("javascript:"));
    }

    #[test]
    fn runs_are_listed() {
        let run = HistoricRun {
            run: RunId::try_from("20261126T030000Z-0a1b2c".to_owned()).unwrap(),
            closed_at: NOW,
            elapsed: "5m 3s".to_owned(),
            total: 24_500,
            cached: 22_000,
            processed: 2_490,
            failed: 10,
        };
        let page = of_runs(&RunHistory { runs: vec![run] });
        let row = "<tr><td class=\"t\">2026-11-26 03:00 UTC<td class=\"n\">24,500<td class=\"n w\">22,000<td class=\"n\">2,490<td class=\"n bad\">10<td class=\"n w\">5m 3s<td class=\"w\"><a href=\"20261126T030000Z-0a1b2c/summary.json\">20261126T030000Z-0a1b2c</a>\n";
        assert!(page.contains(row), "{page}");
    }
}

//! Hit rate over the size of the cache, a panel for each text, as SVG.
//!
//! Colours are Okabe and Ito's, which people who see few colours tell apart; marks and dashes differ
//! as well.

use std::fmt::Write;

use super::replay::Kind;

/// A line: for each size of the cache, as a part of all experts, the hit rate.
pub(super) type Line = Vec<(f64, f64)>;

/// One text.
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) lines: Vec<(Kind, Line)>,
}

const PLOT: (f64, f64) = (300.0, 240.0);
/// Around a plot: left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (56.0, 34.0, 18.0, 50.0);
const LEGEND: f64 = 74.0;
const COLUMNS: usize = 3;

struct Style {
    colour: &'static str,
    width: f64,
    dash: &'static str,
    /// Around (0, 0).
    mark: &'static str,
}

fn style(kind: Kind) -> Style {
    let (colour, width, dash, mark) = match kind {
        Kind::Lru => ("#0072b2", 1.6, "none", "M-3.5,-3.5h7v7h-7z"),
        Kind::Segmented => ("#e69f00", 1.6, "none", "M0,-4.5L4.2,3.5H-4.2z"),
        Kind::Ageing => ("#009e73", 1.6, "none", "M0,-4.8L4.8,0L0,4.8L-4.8,0z"),
        Kind::Ours => ("#d55e00", 2.8, "none", "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z"),
        Kind::Belady => ("#000000", 1.6, "6 4", "M-4,-4L4,4M-4,4L4,-4"),
    };
    Style { colour, width, dash, mark }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

struct Svg(String);

impl Svg {
    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{element}");
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, more: &str, text: &str) {
        let text = escape(text);
        self.add(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" {more}>{text}</text>"#
        ));
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
        self.add(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}"/>"#
        ));
    }

    /// A line with its marks.
    fn curve(&mut self, kind: Kind, points: &[(f64, f64)]) {
        let Style { colour, width, dash, mark } = style(kind);
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.add(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>"#,
            path.join(" ")
        ));
        let filled = if kind == Kind::Belady { "none" } else { colour };
        for (x, y) in points {
            self.add(format_args!(
                r#"<path d="{mark}" transform="translate({x:.1},{y:.1})" fill="{filled}" stroke="{colour}"/>"#
            ));
        }
    }

    fn panel(&mut self, panel: &Panel, (left, top): (f64, f64)) {
        let (width, height) = PLOT;
        let at = |(size, rate): (f64, f64)| (left + size * width, top + (1.0 - rate) * height);
        for tick in 0..=5 {
            let rate = f64::from(tick) / 5.0;
            let (from, to) = (at((0.0, rate)), at((1.0, rate)));
            self.line(from, to, "#dddddd");
            self.text((from.0 - 7.0, from.1 + 4.0), "end", "", &format!("{rate:.1}"));
        }
        let sizes = panel.lines.first().map_or(&[][..], |(_, line)| line);
        for &(size, _) in sizes {
            let (from, to) = (at((size, 0.0)), at((size, 1.0)));
            self.line(from, to, "#eeeeee");
            let label = format!("{:.0} %", 100.0 * size);
            self.text((from.0, from.1 + 16.0), "middle", "", &label);
        }
        self.line(at((0.0, 0.0)), at((1.0, 0.0)), "#444444");
        self.line(at((0.0, 0.0)), at((0.0, 1.0)), "#444444");
        for (kind, line) in &panel.lines {
            let points: Vec<(f64, f64)> = line.iter().map(|&point| at(point)).collect();
            self.curve(*kind, &points);
        }
        let title = (left, top - 12.0);
        self.text(title, "start", r#"font-weight="bold" font-size="14""#, &panel.title);
        let axis = (left + width / 2.0, top + height + 36.0);
        self.text(axis, "middle", "", "experts that have room");
        let (x, y) = (left - 40.0, top + height / 2.0);
        let turned = format!(r#"transform="rotate(-90 {x:.1} {y:.1})""#);
        self.text((x, y), "middle", &turned, "hit rate");
    }
}

/// The picture of some panels, which have the same policies.
pub(super) fn draw(heading: &str, panels: &[Panel]) -> String {
    let columns = panels.len().clamp(1, COLUMNS);
    let cell = (MARGIN.0 + PLOT.0 + MARGIN.2, MARGIN.1 + PLOT.1 + MARGIN.3);
    let rows = panels.len().div_ceil(columns);
    let kinds: Vec<Kind> = panels
        .first()
        .map(|panel| panel.lines.iter().map(|(kind, _)| *kind).collect())
        .unwrap_or_default();
    let step = 160.0;
    let width = (columns as f64 * cell.0).max(40.0 + step * kinds.len() as f64);
    let height = LEGEND + rows as f64 * cell.1;
    let mut svg = Svg(String::new());
    svg.add(format_args!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" font-family="sans-serif" font-size="12" fill="#222222">"##
    ));
    svg.add(format_args!(r##"<rect width="{width:.0}" height="{height:.0}" fill="#ffffff"/>"##));
    svg.text((20.0, 26.0), "start", r#"font-size="16" font-weight="bold""#, heading);
    for (n, &kind) in kinds.iter().enumerate() {
        let x = 20.0 + step * n as f64;
        svg.curve(kind, &[(x, 50.0), (x + 16.0, 50.0), (x + 32.0, 50.0)]);
        svg.text((x + 40.0, 54.0), "start", "", kind.name());
    }
    for (n, panel) in panels.iter().enumerate() {
        let (column, row) = (n % columns, n / columns);
        let left = column as f64 * cell.0 + MARGIN.0;
        svg.panel(panel, (left, LEGEND + row as f64 * cell.1 + MARGIN.1));
    }
    svg.add(format_args!("</svg>"));
    svg.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_a_line_in_every_panel_and_an_entry_in_the_legend() {
        let panel = |title: &str| Panel {
            title: title.into(),
            lines: Kind::ALL.iter().map(|&kind| (kind, vec![(0.1, 0.4), (0.5, 0.9)])).collect(),
        };
        let svg = draw("a < b", &[panel("one & two"), panel("three")]);
        assert_eq!(svg.matches("<polyline").count(), 3 * Kind::ALL.len());
        for kind in Kind::ALL {
            assert!(svg.contains(&format!(">{}</text>", kind.name())));
            let others = Kind::ALL.iter().filter(|&&other| other != kind);
            assert!(others.into_iter().all(|&o| style(o).colour != style(kind).colour));
        }
        assert!(svg.contains("a &lt; b") && svg.contains("one &amp; two"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}

"""The evaluation report: `statistics` (win rate, intervals, diversity), `curves` (figures as SVG), `page` (HTML)."""

"""The evaluation report: `pairs` (its rows and figures), `curves` (charts as SVG), `page` (HTML)."""

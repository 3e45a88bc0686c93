#!/usr/bin/env bash
# A page for `dvc plots` that opens offline: Vega's scripts are in it, and none is loaded from a CDN.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  printf '<!doctype html>\n<html>\n<head>\n  {refresh_tag}\n  <meta charset="utf-8">\n  <title>Plots</title>\n'
  for part in vega@5.20.2 vega-lite@5.2.0 vega-embed@6.18.2; do  # the versions that dvc-render names
    (cd "$work" && tar xzf "$(npm pack --silent "$part")")
    printf '<script>'
    cat "$work/package/build/${part%@*}.min.js"
    printf '</script>\n'
    rm -rf "$work/package"
  done
  printf '</head>\n<body>\n  {plot_divs}\n</body>\n</html>\n'
} > plots_page.html.partial
mv plots_page.html.partial plots_page.html
dvc config --local plots.html_template plots_page.html
echo "dvc plots show and dvc plots diff now draw offline (.dvc/plots_page.html)"

"""The data gate's report as one page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>thumbwheel · data gate: {{ "passed" if success else "stopped" }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2433; --soft: #647084; --line: #e3e7ee; --paper: #fff; --ground: #f5f7fa;
  --good: #12805c; --good-ground: #e5f5ee; --bad: #b42318; --bad-ground: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf2; --soft: #98a3b6; --line: #2c3444; --paper: #1a202c;
  --ground: #12161f; --good: #5dd3a5; --good-ground: #143528; --bad: #ff9a8f; --bad-ground: #43201d; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans SC",
  sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 0 0 .6rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.3rem;
  margin: 1.2rem 0; overflow-x: auto }
.verdict { border-left: 6px solid var(--bad) } .verdict.good { border-left-color: var(--good) }
table { border-collapse: collapse; width: 100% } th { text-align: left; color: var(--soft); font-weight: 600 }
th, td { padding: .4rem .7rem .4rem 0; border-top: 1px solid var(--line); vertical-align: top }
tr:first-child th { border-top: 0 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.mark { display: inline-block; white-space: nowrap; min-width: 4.2rem; text-align: center; border-radius: 999px; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; color: var(--bad); background: var(--bad-ground) }
.mark.good { color: var(--good); background: var(--good-ground) }
code { font: .86rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere } .remedy { color: var(--soft) }
.place { white-space: nowrap }
ul { margin: .4rem 0 0; padding-left: 1.1rem }
</style>
<main>
<section class="verdict {{ 'good' if success }}">
<h1>{{ "The data may be trained on" if success else "The data gate stopped before any training" }}</h1>
<p>{{ checks }} checks on {{ "{:,}".format(rows) }} rows; {{ failed }} not met.
{{ rejected }} unreadable {{ "row" if rejected == 1 else "rows" }}, {{ max_rejected }} allowed
(<code>validate.max_rejected</code> in params.yaml).</p>
</section>
{% if quarantine %}
<section>
<h2>Unreadable rows</h2>
<table>
<tr><th>File</th><th class="n">Line</th><th>What is wrong, and what to do</th><th>How it begins</th></tr>
{% for row in quarantine %}
<tr><td><code class="place">{{ row.file }}</code></td><td class="n">{{ row.line or "–" }}</td>
<td>{{ row.reason }}<br><span class="remedy">Remedy: {{ row.remedy }}</span></td><td><code>{{ row.text }}</code></td></tr>
{% endfor %}
</table>
{% if rejected > quarantine | length %}
<p class="soft">… and {{ rejected - quarantine | length }} more in artifacts/curate/quarantine.jsonl</p>
{% endif %}
</section>
{% endif %}
{% for suite in suites %}
<section>
<h2>{{ suite.name }} <span class="soft">· {{ "{:,}".format(suite.rows) }} {{ "row" if suite.rows == 1 else "rows" }}</span></h2>
<table>
<tr><th></th><th>Expectation</th><th class="n">Rows not meeting it</th></tr>
{% for result in suite.expectations %}
<tr><td><span class="mark {{ 'good' if result.success }}">{{ "met" if result.success else "not met" }}</span></td>
<td>{{ result.checks }}<br><code class="soft">{{ result.type }}</code>
{% if not result.success %}
<p class="remedy">Remedy: {{ result.remedy }}</p>
{% if result.observed is not none %}<p class="remedy">Observed: {{ result.observed }}</p>{% endif %}
<ul>{% for row in result.examples %}
<li><code>artifacts/curate/{{ row.file }}{% if row.line %} line {{ row.line }}{% endif %}: {{ row.value }}</code></li>
{% endfor %}</ul>
{% endif %}</td>
<td class="n">{{ "{:,}".format(result.unexpected) }}</td></tr>
{% endfor %}
</table>
</section>
{% endfor %}
<section>
<h2>Curated files</h2>
<table>
<tr><th>File</th><th class="n">Rows</th></tr>
{% for name, count in files | dictsort %}
<tr><td><code>{{ name }}.jsonl</code></td><td class="n">{{ "{:,}".format(count) }}</td></tr>
{% endfor %}
</table>
</section>
<section>
<h2>What curate did</h2>
<table>
<tr><th>Kind</th><th>Step</th><th class="n">Rows</th></tr>
{% for kind, steps in curate | dictsort %}{% for step, count in steps | dictsort %}
<tr><td>{{ kind }}</td><td>{{ step | replace("_", " ") }}</td><td class="n">{{ "{:,}".format(count) }}</td></tr>
{% endfor %}{% endfor %}
</table>
</section>
</main>
</html>
"""


def render(report: dict[str, Any]) -> str:
    """The page of a report made by flows.validate.examine. Everything that came from data is escaped."""
    results = [result for suite in report["suites"] for result in suite["expectations"]]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    return template.render(
        **report,
        checks=len(results),
        failed=sum(not result["success"] for result in results),
        rows=sum(report["files"].values()),
    )

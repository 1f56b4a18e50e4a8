"""The preflight report as one HTML page: pictures are in it, nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.anchor_advice import anchors_in_words
from pipeline.contact_sheet import Tile

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Preflight report</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #1c2430; }
h1 { font-size: 1.6em; } h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 2px solid #d5dbe3; }
h3 { font-size: 1.05em; margin: 1.4em 0 .4em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #b8c1cd; } td.n, th.n { text-align: right; }
.scroll { max-height: 30em; overflow: auto; }
.bar { display: inline-block; height: .75em; background: #4a86c5; vertical-align: baseline; }
.policy { padding: 0 .5em; border-radius: .6em; color: #fff; background: #6b7785; }
.error { background: #b3261e; } .drop { background: #b26a00; } .fix { background: #2c7a3f; }
.stopped { border: 2px solid #b3261e; padding: .6em 1em; }
details { margin: .2em 0; } summary { cursor: pointer; } code { overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
figure { margin: 0; background: #f1f4f7; padding: 6px; } figure img { max-width: 100%; display: block; margin: auto; }
figcaption { font-size: 12px; overflow-wrap: anywhere; margin-top: 4px; } figcaption .note { color: #8c1d18; }
.class { white-space: nowrap; margin-right: .8em; }
.class i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.none { padding: 3em 1em; text-align: center; color: #6b7785; }
</style>
</head>
<body>
<h1>Preflight report</h1>
{% set reasons = report.splits.values() | map(attribute="stopped") | select | unique | list %}
{% for reason in reasons %}
<p class="stopped"><b>Stopped:</b> {{ reason }}<br>
The numbers below are those up to there.</p>
{% endfor %}
<table>
<tr><th>split</th>
{% for what in ("images", "annotations") %}
<th class="n">{{ what }} read</th><th class="n">kept</th><th class="n">quarantined</th>
{% if reasons %}<th class="n">stopping the job</th>{% endif %}
{% endfor %}</tr>
{% for split in report.splits.values() %}
<tr><td>{{ split.split }}</td>
{% for what in ("images", "annotations") %}
{% for key in ("read", "kept", "quarantined") %}<td class="n">{{ split[what][key] }}</td>{% endfor %}
{% if reasons %}<td class="n">{{ split[what].stopping if split.stopped else 0 }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</table>
<p>Read = kept + quarantined{% if reasons %} + stopping the job, which counts the annotations of images that stop it
too{% endif %}. What is quarantined stands in <code>quarantine.parquet</code>, all of this in
<code>report.json</code>.</p>

{% for split in report.splits.values() %}
<h2>{{ split.split }}</h2>
{% for path in split.annotation_files %}<p><code>{{ path }}</code></p>{% endfor %}
<h3>Problems</h3>
{% if not split.problems %}<p>None found.</p>{% endif %}
{% for problem in split.problems %}
<details>
<summary><b>{{ problem.kind | replace("_", " ") }}</b>: {{ problem.count }}
<span class="policy {{ problem.policy }}">{{ problem.policy }}</span></summary>
<table>
<tr><th>file</th><th class="n">image</th><th class="n">annotation</th><th>what</th></tr>
{% for entry in problem.first %}
<tr><td><code>{{ entry.file_name or "" }}</code></td>
<td class="n">{{ entry.image_id if entry.image_id is not none }}</td>
<td class="n">{{ entry.annotation_id if entry.annotation_id is not none }}</td><td>{{ entry.reason }}</td></tr>
{% endfor %}
</table>
{% if problem.count > problem.first | length %}<p>and {{ problem.count - problem.first | length }} more</p>{% endif %}
</details>
{% endfor %}

<h3>Images, the worst problems first</h3>
<div class="sheet">
{% for tile in tiles[split.split] %}
<figure>
{% if tile.picture %}<img src="data:image/jpeg;base64,{{ tile.picture }}" alt="{{ tile.file_name }}">
{% else %}<div class="none">no picture</div>{% endif %}
<figcaption><b>{{ tile.file_name }}</b>
{% if tile.objects %}<br>{% endif %}
{% for name, colour, number in tile.objects %}<span class="class"><i style="background: {{ colour }}"></i>{{ number }}
{{ name }}</span>
{% endfor %}
{% for note in tile.notes[:4] %}<br><span class="note">{{ note }}</span>{% endfor %}
{% if tile.notes | length > 4 %}<br><span class="note">and {{ tile.notes | length - 4 }} more</span>{% endif %}
</figcaption>
</figure>
{% endfor %}
</div>

<h3>Classes</h3>
<p>Size is the square root of the box's area in pixels of the original image, ratio is width / height; each with its
smallest, quarter, middle, three-quarter and largest value.</p>
<div class="scroll"><table>
<tr><th>class</th><th class="n">images</th><th class="n">instances</th><th class="n">crowds</th><th></th>
<th>size</th><th>ratio</th></tr>
{% for c in split.classes %}
<tr><td>{{ c.name }}</td><td class="n">{{ c.images }}</td><td class="n">{{ c.instances }}</td>
<td class="n">{{ c.crowds }}</td><td>{{ bar(c.instances, split.classes | map(attribute="instances") | max) }}</td>
<td>{{ c.size_percentiles | join(" &middot; " | safe) }}</td>
<td>{{ c.aspect_ratio_percentiles | join(" &middot; " | safe) }}</td></tr>
{% endfor %}
</table></div>

<h3>Instances an image</h3>
<table>
{% for bin in split.instances_per_image %}
<tr><td class="n">{{ bin.objects }}</td><td class="n">{{ bin.images }}</td>
<td>{{ bar(bin.images, split.instances_per_image | map(attribute="images") | max) }}</td></tr>
{% endfor %}
</table>

<h3>Image sizes ({{ split.image_sizes.different }} different, the most common)</h3>
<div class="scroll"><table>
{% for entry in split.image_sizes.most_common %}
<tr><td>{{ entry.size }}</td><td class="n">{{ entry.images }}</td>
<td>{{ bar(entry.images, split.image_sizes.most_common[0].images) }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}

<h2>Anchors</h2>
<p>Share of the training objects whose best anchor has an IoU of at least 0.5 and 0.7 after the configured resize.
In short: {{ verdict }}.</p>
<p>Candidates are suggestions: <code>anchor_search.yaml</code> has them as a search space, nothing is applied.</p>
{% for entry in [report.anchors.configured] + report.anchors.candidates %}
<h3>{{ entry.name }}</h3>
<p>scales {{ entry.scales | join(", ") }}; ratios {{ entry.ratios | join(", ") }}; objects without an anchor of IoU 0.5:
{{ entry.objects_with_none }}</p>
<table>
<tr><th>level of the best anchor</th><th class="n">objects</th><th class="n">IoU &ge; 0.5</th>
<th class="n">IoU &ge; 0.7</th></tr>
{% for level in entry.levels %}
<tr><td>{{ level.level }}</td><td class="n">{{ level.objects }}</td><td class="n">{{ percent(level.recall_50) }}</td>
<td class="n">{{ percent(level.recall_70) }}</td></tr>
{% endfor %}
<tr><th>all</th><th class="n"></th><th class="n">{{ percent(entry.recall_50) }}</th>
<th class="n">{{ percent(entry.recall_70) }}</th></tr>
</table>
{% endfor %}
</body>
</html>
"""
BAR_WIDTH = 220  # pixels of the longest bar


def render(report: Mapping[str, Any], tiles: Mapping[str, Sequence[Tile]]) -> str:
    """The page.

    Args:
        report: what report.json holds.
        tiles: contact sheet of each split.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def bar(value: float, largest: float) -> Markup:
        width = round(BAR_WIDTH * value / largest) if largest else 0
        return Markup('<span class="bar" style="width:{}px"></span>').format(width)

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(
        report=report, tiles=tiles, verdict=anchors_in_words(report["anchors"]), bar=bar, percent=percent
    )

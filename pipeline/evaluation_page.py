"""An evaluation as one HTML page: pictures are in it, nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import evaluation_figures
from pipeline.coco_metrics import STATISTICS
from pipeline.evaluation_gallery import GalleryEntry

_ERROR_KINDS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, poor place",
    "Both": "wrong class and poor place",
    "Dupe": "an object found once more",
    "Bkg": "nothing is there",
    "Miss": "an object that nothing comes near",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Evaluation: {{ title }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #1c2430; }
h1 { font-size: 1.6em; overflow-wrap: anywhere; }
.place { font-size: 12px; color: #5b6675; overflow-wrap: anywhere; margin-top: -1em; }
h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 2px solid #d5dbe3; }
table { border-collapse: collapse; } th, td { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #b8c1cd; position: sticky; top: 0; background: #fff; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { max-height: 34em; overflow: auto; }
.figure { max-width: 100%; } .green { color: #2c8a46; } .red { color: #c5352c; } .yellow { color: #a87400; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(900px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; background: #f1f4f7; padding: 6px; }
figure div { display: flex; gap: 6px; } figure img { width: calc(50% - 3px); object-fit: contain; align-self: start; }
figcaption { font-size: 12px; overflow-wrap: anywhere; margin-top: 4px; }
</style>
</head>
<body>
<h1>Evaluation: {{ title }}</h1>
{% if place %}
<p class="place">{{ place }}</p>
{% endif %}
<p>{{ report.num_images }} images, {{ report.num_objects }} objects, {{ report.num_crowds }} crowds,
{{ report.num_detections }} detections. {{ data }}</p>

<h2>Average precision and recall</h2>
<div class="scroll"><table>
<tr><th></th>{% for name in statistics %}<th class="n">{{ name | replace("_", " ") }}</th>{% endfor %}</tr>
{% for kind, name in kinds.items() %}
<tr><td>{{ name }}</td>{% for key in statistics %}<td class="n">{{ number(report[kind].metrics[key]) }}</td>{% endfor %}
</tr>
{% endfor %}
</table></div>
<p>As COCO counts them: small objects are below 32&sup2; pixels, large ones above 96&sup2;; a dash where there are
none.</p>

{% if report.lvis is defined %}
<h2>LVIS protocol</h2>
<table>
<tr><th></th>{% for name in report.lvis.bbox %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for kind, name in kinds.items() %}
<tr><td>{{ name }}</td>
{% for value in report.lvis[kind].values() %}<td class="n">{{ number(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}

<h2>Precision and recall</h2>
<img class="figure" alt="precision over recall" src="data:image/png;base64,{{ figures.curves }}">

<h2>Kinds of errors</h2>
{% if report.segm.errors %}
<p>At IoU 0.5 (TIDE): how many there are, and by how much AP50 would rise if all of a kind were mended.</p>
<table>
<tr><th>kind</th>{% for name in kinds.values() %}<th class="n">{{ name }}</th>
<th class="n">AP50 lost</th>{% endfor %}</tr>
{% for key, what in error_kinds.items() %}
<tr><td>{{ what }}</td>{% for kind in kinds %}<td class="n">{{ report[kind].errors.counts[key] }}</td>
<td class="n">{{ number(report[kind].errors.delta_ap[key]) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% else %}<p>Nothing was detected.</p>{% endif %}

<h2>Scores</h2>
{% if figures.reliability %}
<p>How often a detection of a score is right at IoU 0.5. On the dashed line a score of 0.7 is right in 7 of
10 cases.</p>
<img class="figure" alt="reliability of scores" src="data:image/png;base64,{{ figures.reliability }}">
{% else %}<p>Nothing was detected.</p>{% endif %}

<h2>What is taken for what</h2>
<p>Masks at IoU 0.5, scores from 0.5 on; the last column is what was missed, the last row what is not there
(or is a crowd).</p>
<img class="figure" alt="confusion matrix" src="data:image/png;base64,{{ figures.confusion }}">
{% if report.segm.confusion.pairs %}
<table>
<tr><th>one class</th><th>taken for another</th><th class="n">objects</th></tr>
{% for pair in report.segm.confusion.pairs %}
<tr><td>{{ pair.truth }}</td><td>{{ pair.predicted }}</td><td class="n">{{ pair.count }}</td></tr>
{% endfor %}
</table>
{% endif %}

<h2>Classes</h2>
<div class="scroll"><table>
<tr><th>class</th><th class="n">objects</th><th class="n">detections</th>
{% for name in kinds.values() %}<th class="n">{{ name }}: AP</th>{% for key in by_size %}<th class="n">
{{ key | replace("_", " ") }}</th>{% endfor %}{% endfor %}</tr>
{% for entry in report.per_class | sort(attribute="segm_AP") %}
<tr><td>{{ entry.class }}</td><td class="n">{{ entry.objects }}</td><td class="n">{{ entry.detections }}</td>
{% for kind in kinds %}<td class="n">{{ number(entry[kind + "_AP"]) }}</td>{% for key in by_size %}
<td class="n">{{ number(entry[kind + "_" + key]) }}</td>{% endfor %}{% endfor %}</tr>
{% endfor %}
</table></div>

<h2>The worst images</h2>
{% if gallery %}
<p>What is there on the left (<b class="green">found</b>, <b class="yellow">missed</b>), detections with a score
from 0.5 on on the right (<b class="green">right</b>, <b class="red">wrong</b>); at IoU 0.5 of the masks, most errors
first.</p>
<div class="sheet">
{% for entry in gallery %}
<figure><div><img src="data:image/jpeg;base64,{{ entry.truth }}" alt="truth">
<img src="data:image/jpeg;base64,{{ entry.found }}" alt="found"></div>
<figcaption><b>{{ entry.file_name }}</b><br>{{ entry.note }}</figcaption></figure>
{% endfor %}
</div>
{% else %}<p>No image has an error.</p>{% endif %}
</body>
</html>
"""


def rounded(value: float | None) -> str:
    """A metric in three digits, or a dash where there is none, which COCO counts as -1."""
    return "-" if value is None or value < -0.5 else f"{value:.3f}"


def render(
    report: Mapping[str, Any],
    gallery: Sequence[GalleryEntry],
    class_names: Sequence[str],
    title: str,
    place: str | None,
    data: str,
) -> str:
    """The page.

    Args:
        report: what report.json holds.
        gallery: the worst images.
        class_names: of classes 1..C-1.
        title: what was evaluated, in a few words.
        place: where that lies, where the title does not say it.
        data: on what, in a sentence.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(
        report=report,
        gallery=gallery,
        title=title,
        place=place,
        data=data,
        number=rounded,
        statistics=STATISTICS,
        kinds=evaluation_figures.KIND_NAMES,
        error_kinds=_ERROR_KINDS,
        by_size=("AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
        figures={
            "curves": evaluation_figures.precision_recall(report),
            "reliability": evaluation_figures.reliability(report),
            "confusion": evaluation_figures.confusion(report, class_names),
        },
    )

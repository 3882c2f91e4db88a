"""Renderers: how results are shown and saved. Nothing is measured here.

``terminal``, ``github`` and ``html`` (with ``vector`` and ``figures``) show a
:class:`~frostline.types.report.Report`; they share ``wording``, ``excerpts``, ``escaping`` and
``palette``. ``schema`` is its JSON form, ``files`` saves it. ``text`` has the other tables.
"""

from __future__ import annotations

from frostline.atomic import generators, taken_back

with taken_back(generators()):  # rich draws from Python's generator when it is imported
    import rich.style  # noqa: F401

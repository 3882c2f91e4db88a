"""``frostline lint``: the findings that need no data."""

from __future__ import annotations

from frostline.cli.options import ModelOptions, ReportOptions, RuleOptions, command


@command
def lint(model: ModelOptions, which: RuleOptions, report: ReportOptions) -> int:
    """Check BN configuration and stored numbers; needs no data. Exit code 1 on findings."""
    from frostline.cli import model_files, reports
    from frostline.verbs import diagnose as verbs

    reports.check_output(report.output, force=report.force)
    chosen = which.chosen()
    found = verbs.lint(model_files.open_model(model), **chosen)
    return reports.show(found, report, model.model)

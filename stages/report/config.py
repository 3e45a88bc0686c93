"""The section `report` of params.yaml."""

from stages.shared.core.params import Section


class Report(Section):
    """No parameters yet."""


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    report: Report

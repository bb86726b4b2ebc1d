"""What a benchmark leaves: the table on stdout, the report in JSON and the picture."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.document import write_report
from trtllm_memshare.report.tables import variants_table


def publish_benchmark(report: dict[str, Any], options: BenchmarkOptions) -> None:
    """Prints the table of ``run_benchmark``'s report and writes the files that the options name."""
    print(variants_table(report))
    if options.output_json is not None:
        write_report(report, options.output_json)
        print(f"report: {options.output_json}")
    if options.plot is not None:
        from trtllm_memshare.report.plots import plot_report

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_report(report, options.plot)
        print(f"picture: {options.plot}")

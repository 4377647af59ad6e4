"""The reports: of a run (`report`), of its data (`data_report`), and comparisons of runs (`compare_runs`)."""

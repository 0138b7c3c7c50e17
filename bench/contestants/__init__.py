"""Programs that train a workload, each in processes of its own; the first worker prints one line of JSON."""

"""One case proven: inputs drawn, reference and truth run, their outputs compared and judged."""

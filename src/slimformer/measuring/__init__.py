"""Times, scores and the machine they were taken on. It never draws a report."""

"""Measures models side by side on this machine: speed, quality and circumstances.

`sessions` opens model files in runtimes, `timing` times them in turn, `scoring` scores them with paired intervals and makes the
`records`; `machine` tells what they were measured on. `latency` times what heads and neurons cost. Nothing here draws a report.
"""

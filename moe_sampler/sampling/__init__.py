"""The mathematics and the loop: paths, predictions, solvers and routers, the plan, and running it."""

"""`speft doctor`: can this machine and this installation run the package? Imports no torch in this process.

Whatever can crash or hang (torch, DeepSpeed, drivers, compilers, networks) is asked in processes of its own
with a time limit, and all checks run beside each other in threads that nobody has to wait for.
"""

from speft_ds.doctor.check import Check
from speft_ds.doctor.report import examine, exit_code, print_report

__all__ = ["Check", "examine", "exit_code", "print_report"]

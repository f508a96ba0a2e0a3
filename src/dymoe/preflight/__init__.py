"""What can be said before a run: `dymoe doctor`, memory and time, a run of true shape without data or weights."""

"""The toy task of the CPU run: data, models and reward, all made here."""

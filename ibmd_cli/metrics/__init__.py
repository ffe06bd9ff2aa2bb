"""Metrics: functions of arrays (energy score, PSNR, KID, FID, …) and the networks they look through."""

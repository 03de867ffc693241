// gpu/cuda/machine.cuh for the host.
#pragma once

inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float choose(bool yes, float x, float y) { return yes ? x : y; }
inline int kept(int x) { return x; }
inline void meet(int number, unsigned threads) {
    host::come(host::block_meetings[number], [threads] { return threads; });
}
inline void pass(int number, unsigned threads) {
    host::come(host::block_meetings[number], [threads] { return threads; }, false);
}

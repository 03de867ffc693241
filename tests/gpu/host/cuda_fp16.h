// float16 of CUDA: named by numbers.cuh, used by no kernel that runs on the host.
#pragma once
struct __half {
    unsigned short bits;
};
float __half2float(__half);
__half __float2half_rn(float);
